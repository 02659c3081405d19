"""Look at the images, or spectrograms of recordings, that a network is trained on, and at what it has learned.

    python tools/visualize.py                                      all five, for the newest checkpoints/*/best.pth
    python tools/visualize.py gradcam --checkpoint some.pth        one of them
    python tools/visualize.py augmentation --checkpoint train.py   before training: what train.py's constants do

Outputs in results/:

    augmentation.png         training images as they are, augmented, and mixed as in the checkpoint's run
    gradcam/<class>.png      the most confident correct and misclassified predictions of each class, and the regions
                             that support them: bright, with a contour at half of the maximum; in small images by the
                             maps of an earlier stage, since the last one's, 1/32 of the image's size, are too coarse
    receptive_field.png      effective receptive field: how strongly each input pixel influences the centre of the last
                             stage's map, beside other networks; receptive_field.csv holds the numbers
    kernels.png              the merged large kernels of each stage
    features.png             images of data/val as points, close to each other if their features are similar (t-SNE)

Exit status: 0; 1 an error; 2 an invalid option.
"""

import ast
import os
import sys
import tokenize
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import timm
import torch
from torch import nn

from common.audio import kind_of, spectrogram_size
from common.augment import augmentation_from_config
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import height_and_width, open_image_folder, seed_everything, transform_of
from common.device import choose_device
from common.evaluation import choose_images, read_batches
from common.files import write_csv
from common.hub import published_network
from common.fit import visible_part
from common.manifest import choose_mean_and_std, read_sound
from common.network import IMG_SIZE as DEFAULT_SIZE
from common.options import ConstantError, ImageSize, Limits, Name, NonNegativeInt, PositiveInt, UserError, run
from common.plots import plot_augmentation, plot_kernels, plot_map, plot_receptive_fields, plot_sheet
from common.text import label
from tools.grad_cam import grad_cam, overlay

Plot = Literal["augmentation", "gradcam", "receptive_field", "kernels", "features"]

WHAT: list[Plot] = []  # plots to draw: augmentation, gradcam, receptive_field, kernels, features; []: all
CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
DATA: Name = "data"  # folder with val/, and train/ for augmentation
IMAGES: NonNegativeInt = 600  # images of val/ for gradcam and features, equally many of each class; 0: all
SHOWN: PositiveInt = 5  # correct and misclassified predictions per class in gradcam; augmentation shows one image more
COMPARE: list[Name] = ["resnet50.a1_in1k", "convnext_tiny.fb_in1k"]  # checkpoints or timm's pretrained names; []: none
FIELD_SIZE: ImageSize = 512  # image size in pixels for receptive_field
FIELD_IMAGES: PositiveInt = 20  # images of val/ over which receptive_field averages
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or a device such as "cuda:1"
SEED: Annotated[int, Limits(0, 2**32 - 1)] = 42  # choice of the images, their augmentation, and the start of t-SNE
OUTPUT: Name = "results"  # folder for the files; those of an earlier call are replaced

PERCENTAGES = (50, 90, 99)  # of the gradient, in the squares of receptive_field
TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"


def main():
    what = WHAT or ["augmentation", "gradcam", "receptive_field", "kernels", "features"]
    if "receptive_field" in what:
        for name in COMPARE:
            if not Path(name).is_file() and name not in timm.list_pretrained():
                raise ConstantError(
                    f"COMPARE must hold files of checkpoints or names of timm's pretrained networks, got {name!r}"
                )
    folder = Path(OUTPUT)
    folder.mkdir(parents=True, exist_ok=True)
    if what == ["augmentation"] and uses_train_script(CHECKPOINT):
        config, sound = read_values(TRAIN_SCRIPT), read_sound(DATA)
        config["IMG_SIZE"] = config["IMG_SIZE"] or DEFAULT_SIZE
        mean, std, _ = choose_mean_and_std(DATA, config.get("MEAN"), config.get("STD"), sound)
        print("                augmentation of train.py's constants")
        show_augmentation(config, mean, std, sound, Path(DATA, "train"), SHOWN + 1, SEED, folder)
        return

    path = find_checkpoint(CHECKPOINT)
    checkpoint = load_checkpoint(path)
    sound = checkpoint.get("sound")
    if "augmentation" in what and "config" not in checkpoint:
        print(f"skipped         augmentation: {path} does not say how it was trained")
    elif "augmentation" in what:
        config, mean, std = (checkpoint[key] for key in ("config", "mean", "std"))
        config = dict(IMG_SIZE=max(height_and_width(checkpoint["img_size"]))) | config
        print(f"                augmentation of {path}")
        show_augmentation(config, mean, std, sound, Path(DATA, "train"), SHOWN + 1, SEED, folder)
    if what == ["augmentation"]:
        return
    device = choose_device(DEVICE)
    network = build_network(checkpoint).to(device)
    print(f"network         {path}: {checkpoint['arch']}, {len(checkpoint['classes'])} classes, {device}")
    count = IMAGES and max(IMAGES, FIELD_IMAGES)
    paths, labels = choose_images(Path(DATA, "val"), checkpoint["classes"], count, SEED)
    chosen = slice(IMAGES or None)
    if "gradcam" in what:
        show_grad_cam(checkpoint, network, paths[chosen], labels[chosen], SHOWN, device, folder)
    if "receptive_field" in what:
        show_receptive_field(checkpoint, network, paths[:FIELD_IMAGES], FIELD_SIZE, COMPARE, device, folder)
    if "kernels" in what:
        show_kernels(network, folder)
    if "features" in what:
        show_features(checkpoint, network, paths[chosen], labels[chosen], SEED, device, folder)


def uses_train_script(checkpoint):
    """Whether CHECKPOINT asks for train.py's constants: by name, or "" where there is no checkpoint of the user's."""
    return checkpoint == "train.py" or not checkpoint and not any(Path("checkpoints").glob("*/best.pth"))


def read_values(path):
    """Read the values of a script's constants without running it.

    Returns:
        {name: value}.

    Raises:
        UserError: if one is computed, or the script is no Python.
    """
    try:
        with tokenize.open(path) as file:  # as Python reads it, with or without a byte order mark
            tree = ast.parse(file.read())
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}; fix this line") from error
    values = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.target.id.isupper():
            try:
                values[node.target.id] = ast.literal_eval(node.value)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {node.lineno}: {node.target.id} is computed; write its value instead"
                ) from error
    return values


def show_augmentation(config, mean, std, sound, root, count, seed, folder):
    """Draw augmentation.png.

    Args:
        config: {name of a constant of train.py: value}.
        mean, std: three values each, for pixels from 0 to 1.
        sound: how spectrograms are made, see common/audio.py; None for images.
        root: such as data/train.
        count: number of images.
        seed: of their choice and their augmentation.
        folder: to write to.
    """
    dataset = open_image_folder(root)
    classes = dataset.classes
    paths, labels = choose_images(root, classes, count, seed)
    size = spectrogram_size(sound) if sound else (config["IMG_SIZE"], config["IMG_SIZE"])
    transform, mixup = augmentation_from_config(config, len(classes), size, mean, std, sound)
    images = [dataset.loader(path) for path in paths]
    seed_everything(seed)
    path = folder / "augmentation.png"
    plot_augmentation(images, labels, classes, transform, mixup, path)
    print(f"augmentation    {path}")


def show_grad_cam(checkpoint, network, paths, labels, shown, device, folder):
    """Draw gradcam/<class>.png with `shown` correct and as many misclassified predictions."""
    classes, load = checkpoint["classes"], kind_of(checkpoint).load
    transform = transform_of(checkpoint)
    probabilities, cams = [], []
    for images in read_batches(paths, transform, 16, "gradcam", load):
        logits, cam, where = grad_cam(network, images.to(device))
        probabilities.append(logits.softmax(1).cpu().numpy())
        cams.append(cam.half().cpu().numpy())
    probabilities, cams = np.concatenate(probabilities), np.concatenate(cams)
    predictions, confidence, labels = probabilities.argmax(1), probabilities.max(1), np.array(labels)
    folder = folder / "gradcam"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(classes):
        mine = sorted(np.flatnonzero(labels == number), key=lambda i: -confidence[i])
        correct = [i for i in mine if predictions[i] == number][:shown]
        misclassified = [i for i in mine if predictions[i] != number][:shown]
        columns = max(len(correct), len(misclassified))
        cells, captions, rows = [], [], []
        for found, title in ((correct, "correct"), (misclassified, "misclassified")):
            if found:
                images = [visible_part(load(paths[i]), checkpoint.get("fit", "squeeze")) for i in found]
                empty = columns - len(found)
                cells += images + [None] * empty + [overlay(image, cams[i]) for image, i in zip(images, found)]
                cells += [None] * empty
                captions += [label(paths[i].name) for i in found] + [""] * empty
                captions += [f"{label(classes[predictions[i]])} {confidence[i]:.2f}" for i in found] + [""] * empty
                rows += [f"{label(name)}\n{title}", f"Grad-CAM\n{where}"]
        if cells:
            # A folder's name may be too long for a file's, which has an extension.
            file = f"{name if len(os.fsencode(name)) < 250 else number}.png"
            plot_sheet(cells, captions, folder / file, columns, rows)
    print(f"gradcam         {folder}, {len(paths)} images, maps of {where}")


def show_receptive_field(checkpoint, network, paths, size, compare, device, folder):
    """Draw receptive_field.png and write receptive_field.csv for the network and those named in `compare`."""
    networks = {checkpoint["arch"]: network}
    for name in compare:
        other = open_network(name, device)
        if other is not None:
            short = Path(name).resolve().parent.name if Path(name).is_file() else name
            networks[name if short in networks else short] = other
    fields = {}
    transform = transform_of(checkpoint, size)
    for name, network in networks.items():
        batches = read_batches(paths, transform, 1, name, kind_of(checkpoint).load)
        field = receptive_field(network, batches, device)
        fields[name] = field, {percent: central_square(field, percent) for percent in PERCENTAGES}
    path = folder / "receptive_field.png"
    plot_receptive_fields(fields, path)
    header = ["network", *(f"side of the square with {percent} % / pixels" for percent in PERCENTAGES)]
    rows = [[name, *sides.values()] for name, (_, sides) in fields.items()]
    write_csv(path.with_suffix(".csv"), [header, *rows], encoding="utf-8")
    for name, (_, sides) in fields.items():
        print(f"                {name}: " + ", ".join(f"{percent} % within {sides[percent]} px" for percent in sides))
    print(f"receptive_field {path}, {len(paths)} images")


def open_network(name, device):
    """Open a checkpoint or one of timm's pretrained networks, in eval mode; None if the latter cannot be downloaded.

    Untrained networks are not compared: the residual branches of many are scaled to nothing at first.
    """
    if Path(name).is_file():
        return build_network(load_checkpoint(name)).to(device)
    try:
        network = published_network(name, "set COMPARE to files of your checkpoints, or to nothing")
    except UserError as error:
        print(f"skipped         {name}: {error}")
        return None
    return timm.utils.reparameterize_model(network.eval()).to(device)


def receptive_field(network, batches, device):
    """Effective receptive field (Luo et al., arXiv:1701.04128) as for RepLKNet (Ding et al., arXiv:2203.06717).

    The gradient of the centre of the last stage's map, positive parts summed over its channels, with respect to each
    pixel; positive parts summed over the colours and averaged over the images.

    Args:
        network: has `forward_features`, which returns (N, C, H, W).
        batches: tensors (N, 3, size, size).
        device: of the network.

    Returns:
        float64 array (size, size) of sum 1.

    Raises:
        UserError: if the network has no feature maps, or no positive gradient.
    """
    total = 0.0
    for images in batches:
        images = images.to(device).requires_grad_()
        maps = network.forward_features(images)
        if maps.ndim != 4:
            raise UserError(f"receptive_field needs feature maps (N, C, H, W), not {tuple(maps.shape)}")
        centre = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].relu().sum()
        total = total + torch.autograd.grad(centre, images)[0].relu().sum((0, 1)).double().cpu().numpy()
    if not total.sum() > 0:
        raise UserError("receptive_field needs a trained network, but no gradient of this one is positive")
    return total / total.sum()


def central_square(field, percent):
    """Side in pixels of the smallest square around the centre of `field` that holds `percent` % of its sum."""
    offset = np.abs(np.arange(len(field)) - len(field) // 2)
    ring = np.maximum(offset[:, None], offset)  # number of each pixel's ring around the centre
    inside = np.bincount(ring.ravel(), field.ravel()).cumsum()
    return 2 * int(np.searchsorted(inside, percent / 100)) + 1


def show_kernels(network, folder):
    """Draw kernels.png of a reparameterized network, if it has large kernels."""
    kernels = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.kernel_size[0] >= 7:
            stage = ".".join(name.split(".")[:2])  # of stages.1.0.dwconv.lk_origin
            kernels.setdefault(stage, []).append(module.weight.detach().squeeze(1).cpu().numpy())
    if not kernels:
        print("skipped         kernels: the network has no depthwise kernel of 7 x 7 or larger")
        return
    path = folder / "kernels.png"
    plot_kernels({stage: np.concatenate(weights) for stage, weights in kernels.items()}, path)
    print(f"kernels         {path}")


@torch.inference_mode()
def show_features(checkpoint, network, paths, labels, seed, device, folder):
    """Draw features.png from the pooled features."""
    if len(paths) < 4:
        raise UserError(f"features needs 4 images or more, got {len(paths)}; raise IMAGES, or remove it from WHAT")
    transform = transform_of(checkpoint)
    features = []
    for images in read_batches(paths, transform, 32, "features", kind_of(checkpoint).load):
        maps = network.forward_features(images.to(device))
        features.append(network.forward_head(maps, pre_logits=True).float().cpu().numpy())
    from sklearn.manifold import TSNE  # takes two seconds to import

    # The usual perplexity is 30; it must be smaller than the number of images.
    points = TSNE(perplexity=min(30, (len(paths) - 1) / 3), init="pca", random_state=seed)
    path = folder / "features.png"
    plot_map(points.fit_transform(np.concatenate(features)), labels, checkpoint["classes"], path)
    print(f"features        {path}, {len(paths)} images")


if __name__ == "__main__":
    run(main, positional="WHAT")
