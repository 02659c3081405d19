"""Look at the pictures, or spectrograms of sounds, that a network is trained on, and at what it has learned.

    python tools/visualize.py augmentation                         before training: what train.py's constants do
    python tools/visualize.py                                      all five, for the newest checkpoints/*/best.pth
    python tools/visualize.py gradcam --checkpoint some.pth        one of them

Leaves in results/:

    augmentation.png         pictures as they are, augmented, and mixed as train.py does it
    gradcam/<class>.png      the surest right and wrong answers of each class, and which part of the picture spoke for
                             them: bright, with a line around what counts at least half as much as the best place;
                             as coarse as the last stage's map, whose pixels are 32 of the picture's
    receptive_field.png      effective receptive field: how much each pixel of the input moves the middle of the last
                             stage's map, beside other networks; receptive_field.csv holds the numbers
    kernels.png              the merged large kernels of each stage
    features.png             pictures of data/val as points: near each other if the network finds them alike (t-SNE)

Exit status: 0; 1 an error; 2 a wrong option.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.manifold import TSNE
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts and common/
import train
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import eval_transform, open_image_folder, seed_everything
from common.device import choose_device
from common.evaluation import choose_pictures, read_batches
from common.gradcam import grad_cam, overlay
from common.manifest import read_sound
from common.options import UserError, run
from common.plots import plot_augmentation, plot_kernels, plot_map, plot_receptive_fields, plot_sheet
from common.sounds import file_kind

WHAT: list[str] = []  # augmentation, gradcam, receptive_field, kernels, features; []: all
CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
DATA: str = "data"  # folder with val/, for augmentation train/
PICTURES: int = 600  # pictures of val/ that gradcam and features look at, as many of each class; 0: all
SHOWN: int = 5  # right and wrong answers of each class in gradcam, and pictures in augmentation
COMPARE: list[str] = ["resnet50.a1_in1k", "convnext_tiny.fb_in1k"]  # beside it: checkpoints, or timm's pretrained names
FIELD_SIZE: int = 512  # edge in pixels to which pictures are resized for receptive_field
FIELD_PICTURES: int = 20  # pictures of val/ over which receptive_field averages
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
SEED: int = 42  # choice of the pictures, their augmentation, and the start of t-SNE
OUTPUT: str = "results"  # folder for the files; those of an earlier call are replaced

SHARES = (50, 90, 99)  # percent of the gradient in the squares of receptive_field


def show_augmentation(folder):
    """Draw augmentation.png by train.py's own functions and constants."""
    sound = read_sound(DATA)
    pictures = open_image_folder(Path(DATA, "train"), sound=sound)
    paths, labels = choose_pictures(Path(DATA, "train"), pictures.classes, SHOWN + 1, SEED, sound)
    seed_everything(SEED)
    transform = train.train_transform([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], sound)
    mixup = train.create_mixup(len(pictures.classes), sound)
    path = folder / "augmentation.png"
    plot_augmentation(
        [pictures.loader(file) for file in paths], labels, pictures.classes, transform, mixup, train.mix, path
    )
    return path


def show_grad_cam(checkpoint, network, paths, labels, device, folder):
    """Draw gradcam/<class>.png."""
    classes, sound = checkpoint["classes"], checkpoint.get("sound")
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    probabilities, cams = [], []
    for images in read_batches(paths, transform, 16, "gradcam", sound):
        logits, cam = grad_cam(network, images.to(device))
        probabilities.append(logits.softmax(1).cpu().numpy())
        cams.append(cam.half().cpu().numpy())
    probabilities, cams = np.concatenate(probabilities), np.concatenate(cams)
    answers, sureness, labels = probabilities.argmax(1), probabilities.max(1), np.array(labels)
    folder = folder / "gradcam"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(classes):
        cells, captions = [], []
        for chosen in (answers == number, answers != number):
            found = sorted(np.flatnonzero(chosen & (labels == number)), key=lambda i: -sureness[i])[:SHOWN]
            photos = [file_kind(sound).load(paths[i]) for i in found]
            empty = [None] * (SHOWN - len(found))
            cells += photos + empty + [overlay(photo, cams[i]) for photo, i in zip(photos, found)] + empty
            captions += [f"{paths[i].name[:24]}" for i in found] + [""] * len(empty)
            captions += [f"{classes[answers[i]]} {sureness[i]:.2f}" for i in found] + [""] * len(empty)
        rows = [f"{name}: right", "what counts", f"{name}: wrong", "what counts"]
        plot_sheet(cells, captions, folder / f"{name}.png", SHOWN, rows)
    return folder


def open_network(name, device):
    """{name: network in eval mode} of a checkpoint or of timm's pretrained weights; {} if these cannot be downloaded.

    Untrained networks are not compared: many begin with residual branches that are scaled to nothing.
    """
    if Path(name).is_file():
        return {Path(name).resolve().parent.name: build_network(load_checkpoint(name)).to(device)}
    if name not in timm.list_pretrained():
        raise UserError(f"COMPARE names {name}, which is neither a checkpoint nor one of timm's pretrained networks")
    try:
        network = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # no network, a proxy, a hub that is down: many kinds
        print(f"left out    {name}: its weights cannot be downloaded ({type(error).__name__})")
        return {}
    return {name: timm.utils.reparameterize_model(network).to(device)}


def receptive_field(network, batches, device):
    """Effective receptive field (Luo et al., arXiv:1701.04128) as for RepLKNet (Ding et al., arXiv:2203.06717).

    The gradient of the middle of the last stage's map, positive parts summed over its channels, with respect to each
    pixel; positive parts summed over the colours and averaged over the pictures.

    Returns:
        float64 array (size, size) of sum 1.
    """
    total = 0.0
    for images in batches:
        images = images.to(device).requires_grad_()
        maps = network.forward_features(images)
        if maps.ndim != 4:
            raise UserError(f"receptive_field needs feature maps (N, C, H, W), not {tuple(maps.shape)}")
        middle = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].relu().sum()
        total = total + torch.autograd.grad(middle, images)[0].relu().sum((0, 1)).double().cpu().numpy()
    return total / total.sum()


def middle_square(field, share):
    """Edge in pixels of the smallest square around the middle of `field` that holds `share` percent of it."""
    offset = np.abs(np.arange(len(field)) - len(field) // 2)
    ring = np.maximum(offset[:, None], offset)  # number of each pixel's ring around the middle
    inside = np.bincount(ring.ravel(), field.ravel()).cumsum()
    return 2 * int(np.searchsorted(inside, share / 100)) + 1


def show_receptive_field(checkpoint, network, paths, device, folder):
    """Draw receptive_field.png and write receptive_field.csv."""
    networks = {checkpoint["arch"]: network}
    for name in COMPARE:
        networks |= open_network(name, device)
    fields = {}
    transform = eval_transform(FIELD_SIZE, checkpoint["mean"], checkpoint["std"])
    for name, network in networks.items():
        batches = read_batches(paths[:FIELD_PICTURES], transform, 1, name, checkpoint.get("sound"))
        field = receptive_field(network, batches, device)
        fields[name] = field, {share: middle_square(field, share) for share in SHARES}
    path = folder / "receptive_field.png"
    plot_receptive_fields(fields, path)
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["network", *(f"edge of the square with {share} % / pixels" for share in SHARES)])
        writer.writerows([name, *edges.values()] for name, (_, edges) in fields.items())
    for name, (_, edges) in fields.items():
        print(f"            {name}: " + ", ".join(f"{share} % within {edge} px" for share, edge in edges.items()))
    return path


def show_kernels(network, folder):
    """Draw kernels.png from a merged network; returns its path, or None if there is no large kernel."""
    kernels = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.kernel_size[0] >= 7:
            stage = ".".join(name.split(".")[:2])  # of stages.1.0.dwconv.lk_origin
            kernels.setdefault(stage, []).append(module.weight.detach().squeeze(1).cpu().numpy())
    if not kernels:
        print("left out    kernels: the network has no depthwise kernel of 7 x 7 or more")
        return None
    path = folder / "kernels.png"
    plot_kernels({stage: np.concatenate(weights) for stage, weights in kernels.items()}, path)
    return path


@torch.inference_mode()
def show_features(checkpoint, network, paths, labels, device, folder):
    """Draw features.png from the pooled features."""
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    features = []
    for images in read_batches(paths, transform, 32, "features", checkpoint.get("sound")):
        maps = network.forward_features(images.to(device))
        features.append(network.forward_head(maps, pre_logits=True).float().cpu().numpy())
    if len(paths) < 4:
        raise UserError(f"features needs 4 pictures or more, got {len(paths)}; raise PICTURES, or leave it out of WHAT")
    # The usual perplexity is 30; it must be smaller than the number of pictures.
    points = TSNE(perplexity=min(30, (len(paths) - 1) / 3), init="pca", random_state=SEED)
    path = folder / "features.png"
    plot_map(points.fit_transform(np.concatenate(features)), labels, checkpoint["classes"], path)
    return path


def main():
    choices = ["augmentation", "gradcam", "receptive_field", "kernels", "features"]
    unknown = set(WHAT) - set(choices)
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))} cannot be drawn; choose from {', '.join(choices)}")
    if min(SHOWN, FIELD_PICTURES) < 1 or PICTURES < 0 or FIELD_SIZE < 32:
        raise UserError("SHOWN and FIELD_PICTURES must be at least 1, PICTURES at least 0, FIELD_SIZE at least 32")
    what = WHAT or choices
    folder = Path(OUTPUT)
    folder.mkdir(parents=True, exist_ok=True)

    def tell(name, path):
        if path is not None:
            print(f"{name:11} {path}")

    if "augmentation" in what:
        tell("augmentation", show_augmentation(folder))
    if what == ["augmentation"]:
        return
    path = find_checkpoint(CHECKPOINT)
    checkpoint = load_checkpoint(path)
    device = choose_device(DEVICE)
    network = build_network(checkpoint).to(device)
    print(f"network     {path}: {checkpoint['arch']}, {len(checkpoint['classes'])} classes, {device}")
    sound = checkpoint.get("sound")
    paths, labels = choose_pictures(Path(DATA, "val"), checkpoint["classes"], PICTURES, SEED, sound)
    if "gradcam" in what:
        tell("gradcam", show_grad_cam(checkpoint, network, paths, labels, device, folder))
    if "receptive_field" in what:
        tell("field", show_receptive_field(checkpoint, network, paths, device, folder))
    if "kernels" in what:
        tell("kernels", show_kernels(network, folder))
    if "features" in what:
        tell("features", show_features(checkpoint, network, paths, labels, device, folder))


if __name__ == "__main__":
    run(main, positional="WHAT")
