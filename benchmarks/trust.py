"""How far calibrated probabilities and "unknown" can be trusted, on images that took no part in training.

    python benchmarks/trust.py                                       species of seedlings in data1
    python benchmarks/trust.py --others road_scenes/                 other photographs as well
    python benchmarks/trust.py --second                              the other half of the classes is known

Trains on every second class of SOURCE, from the first one on, or with SECOND from the second one on (makedata.py,
mean_std.py, train.py with OPTIONS; an interrupted run is resumed), and measures its last.pth, whose weights nothing was
selected for:

    calibration    expected calibration error and negative log-likelihood on the validation images of the known classes,
                   each by a temperature that was fitted without it (5 parts), with the one fitted on all for comparison
    new classes    can images of the other classes be told from validation images of the known ones? AUROC of the
                   score, and of the largest softmax probability, the usual baseline
    other scenes   the same for crops of scikit-learn's two sample photographs, and of those in OTHERS

Prints a table in Markdown. AUROC is the probability that an unknown image has the more unusual score of the two.
"""

import platform
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, benchmarks/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import torch
from PIL import Image

from benchmarks.accuracy import link_or_copy, prepare_split, train
from common.calibration import CalibratedNetwork, cross_fit, describe_look, summarise
from common.checkpoint import build_network, load_checkpoint
from common.dataset import transform_of
from common.evaluation import read_batches
from common.files import list_files
from common.images import is_hidden, is_image, load_image
from common.options import Name, NonNegativeInt, PositiveInt, UserError, run

SOURCE: Name = "data1"  # folder that holds <class>/<image>
OTHERS: str = ""  # folder of photographs that show none of the classes; "": scikit-learn's two only
SECOND: bool = False  # train on the second, fourth, ... class; False: on the first, third, ...
CROPS: PositiveInt = 300  # crops of the photographs of each kind
CROP_SIZE: PositiveInt = 150  # side of a crop in pixels
SEED: NonNegativeInt = 42  # of split, training and crops
# Options of train.py: the smallest network, at an image size that suits a CPU.
OPTIONS: str = "--model unireplknet_a --img-size 64 --epochs 8 --warmup-epochs 1 --drop-path 0"  # of train.py; "": none
OUTPUT: Name = "trust"  # folder for split and run


def main():
    classes = sorted(folder for folder in Path(SOURCE).iterdir() if folder.is_dir())
    if len(classes) < 4:
        raise UserError(f"{SOURCE} must hold four classes or more, of which every second one is trained on")
    known, new = classes[SECOND::2], classes[not SECOND :: 2]
    output = Path(OUTPUT, "second" if SECOND else "first")
    for path in (path for folder in known for path in folder.iterdir()):
        link_or_copy(path, output / "data1" / path.parent.name / path.name)
    data = prepare_split(output / "data1", output / "data", SEED)
    checkpoint = load_checkpoint(train(data, output / "run", OPTIONS.split(), SEED, None))

    measure = Measured(checkpoint)
    val = find_images(data / "val")
    logits, score = measure(val)
    labels = torch.tensor([checkpoint["classes"].index(path.parent.name) for path in val])
    unknown = {f"{len(new)} new classes": [path for folder in new for path in find_images(folder)]}
    unknown["crops of scikit-learn's photographs"] = crop(sample_images(), CROPS, CROP_SIZE, SEED)
    if OTHERS:
        paths = find_images(OTHERS)
        unknown[f"crops of {len(paths)} photographs in OTHERS"] = crop(paths, CROPS, CROP_SIZE, SEED)

    trained = f"{checkpoint['arch']}, {checkpoint['img_size']} pixels, {checkpoint['epoch']} epochs"
    print(f"{trained}, {len(known)} classes, {len(val)} validation images; torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, {platform.system()}, {describe_cpu()}\n")
    print_calibration(logits, labels, checkpoint["calibration"]["temperature"])
    print_unknown(measure, logits, score, unknown)


class Measured:
    """Function of images (paths, or PIL images) -> logits (N, classes) before calibration, and the score (N,), larger
    for more unusual images."""

    def __init__(self, checkpoint):
        self.network = CalibratedNetwork(build_network(checkpoint), checkpoint["calibration"])
        if self.network.score is None:
            raise UserError(f"{checkpoint['arch']} has no features for a score; choose another model in OPTIONS")
        self.transform = transform_of(checkpoint)

    @torch.inference_mode()
    def __call__(self, images):
        logits, scores = [], []
        for batch in read_batches(images, self.transform, 32, "images", open_image):
            maps, first = self.network.compute_maps(batch)
            head = self.network.network.forward_head
            logits.append(head(maps))
            scores.append(self.network.score.raw(describe_look(first), head(maps, pre_logits=True)))
        return torch.cat(logits), torch.cat(scores).numpy()


def open_image(image):
    return image if isinstance(image, Image.Image) else load_image(image)


def find_images(folder):
    return sorted(path for path in list_files(Path(folder), is_hidden) if is_image(path))


def crop(images, count, size, seed):
    """`count` random crops of images (paths, or PIL images) in turn, squares of `size` pixels or the shorter side."""
    chance, crops = random.Random(seed), []
    for number in range(count):
        image = open_image(images[number % len(images)])
        side = min(size, *image.size)
        left, top = chance.randint(0, image.width - side), chance.randint(0, image.height - side)
        crops.append(image.crop((left, top, left + side, top + side)))
    return crops


def sample_images():
    """scikit-learn's two sample photographs, a Chinese temple and a flower, as PIL images."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def describe_cpu():
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_calibration(logits, labels, temperature):
    """Print ECE, NLL and the accuracy of the most confident images, before and after."""
    print(f"temperature {temperature:.3f}\n")
    print("| probabilities | n | ECE | NLL | accuracy of the most confident 50 % | 80 % | 90 % | all |")
    print("|---|---|---|---|---|---|---|---|")
    for name, probabilities in (
        ("as the network gives them", logits.double().softmax(1)),
        ("temperature fitted on other images", cross_fit(logits, labels)),
        ("temperature fitted on the same images", (logits.double() / temperature).softmax(1)),
    ):
        metrics = summarise(probabilities.numpy(), labels.numpy())
        accuracies = " | ".join(f"{100 * value:.1f} %" for value in metrics["accuracy_at_coverage"].values())
        print(f"| {name} | {len(labels)} | {metrics['ece']:.4f} | {metrics['nll']:.4f} | {accuracies} |")


def print_unknown(measure, logits, score, unknown):
    """Print how well unknown images are told from validation images.

    Args:
        measure: a `Measured`.
        logits, score: what it returned for the validation images.
        unknown: {what: images}.
    """
    from sklearn.metrics import roc_auc_score

    threshold = np.quantile(score, 0.95)
    print("\n| unknown images | n | AUROC of the score | of the softmax probability | unknown at UNKNOWN = 0.05 |")
    print("|---|---|---|---|---|")
    doubt = 1 - logits.softmax(1).amax(1).numpy()
    for name, images in unknown.items():
        other_logits, other_score = measure(images)
        other_doubt = 1 - other_logits.softmax(1).amax(1).numpy()
        truth = np.repeat([0, 1], [len(score), len(other_score)])
        by_score = roc_auc_score(truth, np.concatenate([score, other_score]))
        by_doubt = roc_auc_score(truth, np.concatenate([doubt, other_doubt]))
        caught = 100 * (other_score > threshold).mean()
        print(f"| {name} | {len(other_score)} | {by_score:.4f} | {by_doubt:.4f} | {caught:.1f} % |")


if __name__ == "__main__":
    run(main)
