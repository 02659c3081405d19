"""How far a prediction can be trusted: calibrated probabilities, and whether an image is of a known kind at all.

train.py calls `calibrate` once, at the end of a run. A checkpoint then holds, under "calibration":

    temperature   by which the logits are divided (temperature scaling; Guo et al., "On calibration of modern neural
                  networks", ICML 2017, arXiv:1706.04599), fitted on the validation images
    score         what `NoveltyScore` needs: statistics of the training images, and the scores of the validation images
                  as a table of quantiles; None if the network has no features that it could be computed from

Temperature scaling never changes which class is first. The score has two parts, and an image is as unusual as the more
unusual of them says:

    look          another kind of scene or sharpness: Mahalanobis distance of the mean and the standard deviation of
                  each channel of the network's first stage, under one Gaussian for all training images, as they are
                  and in other light, since a brighter day is nothing unknown (features of lower layers as in Lee et
                  al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
                  NeurIPS 2018, arXiv:1807.03888)
    class         another kind of object: relative Mahalanobis distance of the pooled last features to the nearest class
                  (Ren et al., "A simple fix to Mahalanobis distance for improving near-OOD detection",
                  arXiv:2106.09022)

Checkpoints of earlier versions have no calibration. Their probabilities are those of the network, and nothing is
unknown to them.
"""

import contextlib
import copy

import numpy as np
import torch
from torch.utils.data import Subset

from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.dataset import PixelTransform, height_and_width
from common.device import choose_layout
from common.evaluation import coverage_curve
from common.faults import Stopped
from common.files import write_json
from common.loading import Loader
from common.options import UserError
from common.plots import plot_calibration
from common.progress import Progress

MAX_IMAGES = 10_000  # training, and validation images that are looked at; of more, they are taken evenly
FOLDS = 5  # parts of the validation images; figures about each are of a temperature fitted on the others
TEMPERATURES = (0.05, 20.0)  # between which it is searched
QUANTILES = 1001  # of the validation images' scores
ROUNDING = 1e-3  # up to which two scores count as the same
BINS = 15  # of confidences, all of the same width, in the expected calibration error
COVERAGES = (0.5, 0.8, 0.9, 1.0)  # fractions of the images, the most confident ones, whose accuracy is reported
LIGHT = 1.5  # factor by which training images are at most brighter or darker, when their look is taken
SCORE = ("look_mean", "look_whitening", "projection", "means", "center", "spread", "scale", "quantiles")


class CalibratedNetwork(torch.nn.Module):
    """A network with the calibration of its checkpoint: images (N, 3, H, W) -> (logits, known).

    logits: (N, classes), divided by the temperature, so that their softmax is calibrated.
    known: (N,), the fraction of the validation images that look at least as unusual, from 0 to 1: a p-value. Of known
    images, a fraction of about u has less than u. None if the checkpoint has no score.

    Args:
        network: from `common.checkpoint.build_network`, merged or not.
        calibration: what the checkpoint has under "calibration"; None: logits as they are, and no score.

    Raises:
        UserError: if the calibration is that of another network.
    """

    def __init__(self, network, calibration=None):
        super().__init__()
        self.network = network
        self.temperature = 1.0 if calibration is None else calibration["temperature"]
        score = None if calibration is None else calibration["score"]
        self.score = None if score is None else NoveltyScore(score)
        if self.score is not None:
            parameter = next(network.parameters())
            images = torch.zeros(1, 3, *height_and_width(calibration["img_size"]), device=parameter.device)
            try:
                with torch.inference_mode():
                    self(images)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                raise UserError("its calibration is that of another network; use another checkpoint") from error

    def forward(self, images, dtype=torch.float32):
        """`dtype` other than float32: that of autocast, except for the head and the score."""
        fast = dtype != torch.float32
        with torch.autocast(images.device.type, dtype) if fast else contextlib.nullcontext():
            maps, first = self.compute_maps(images)
            if not torch.is_tensor(maps):  # of networks with several branches, whose head takes all of them
                return self.network.forward_head(maps).float() / self.temperature, None
        maps = maps.float()
        logits = self.network.forward_head(maps) / self.temperature
        if self.score is None:
            return logits, None
        return logits, self.score(describe_look(first.float()), self.network.forward_head(maps, pre_logits=True))

    def compute_maps(self, images):
        """(the last maps, those of the first stage or None if they are not needed)."""
        if self.score is None:
            return self.network.forward_features(images), None
        maps, (first,) = self.network.forward_intermediates(images, indices=[0])
        return maps, first


def describe_look(maps):
    """Mean and standard deviation of each channel: maps (N, C, H, W) -> (N, 2 C)."""
    return torch.cat([maps.mean((2, 3)), maps.var((2, 3), correction=0).sqrt()], 1)


class NoveltyScore(torch.nn.Module):
    """How unusual images are: look (N, 2 C), features (N, D) -> known (N,), see `CalibratedNetwork`.

    Args:
        statistics: {name of `SCORE`: float32 tensor}, from `fit_score`.
    """

    def __init__(self, statistics):
        super().__init__()
        for name in SCORE:
            self.register_buffer(name, statistics[name], persistent=False)

    def forward(self, look, features):
        raw = self.raw(look, features)
        return (self.quantiles >= raw[:, None]).float().mean(1)

    def raw(self, look, features):
        """The score itself (N,), larger for more unusual images: 0 is the median of the validation images, 1 their 90 %
        quantile, in the part that is larger."""
        parts = self.parts(look, features)
        return ((parts - self.scale[0]) / self.scale[1]).amax(1)

    def parts(self, look, features):
        """The two parts of the score (N, 2): look and class."""
        distance = ((look - self.look_mean) @ self.look_whitening).square().mean(1)
        place = features @ self.projection  # (N, R)
        to_class = (place[:, None] - self.means).square().sum(2).amin(1)
        to_all = ((place - self.center).square() / self.spread).sum(1)
        return torch.stack([distance, to_class - to_all], 1)


def calibrate(folder, train_set, val_set, loader, normalise, interrupt):
    """Calibrate best.pth and last.pth of a run that is complete; those that are calibrated stay as they are.

    A run that is killed here is complete but for this, which is done when it is resumed. The first process does it
    alone, with at most `MAX_IMAGES` images of each set.

    Args:
        folder: the `RunFolder`; calibration.json and calibration.png, which are about best.pth, are written to it.
        train_set, val_set: of type `CachedImageFolder`; of the training images the transform is not used.
        loader: of the validation images, which tells how to load.
        normalise: a `common.device.Normalise`.
        interrupt: a `common.faults.Interrupt`, which is obeyed between two batches.

    Returns:
        whether it was done; False after a signal.
    """
    before = None
    for name in ("best.pth", "last.pth"):
        path = folder.path / name
        if not path.is_file():
            continue
        checkpoint = load_checkpoint(path)
        if "calibration" in checkpoint:
            continue
        if before is None or not same_weights(before, checkpoint):  # the best epoch may be the last one
            device = normalise.white.device
            network = build_network(checkpoint).to(device, memory_format=choose_layout(device))
            transform = PixelTransform(checkpoint["img_size"], fit=checkpoint.get("fit", "squeeze"))
            options = dict(transform=transform, loader=loader, normalise=normalise, interrupt=interrupt)
            try:
                train = look_at_images(network, train_set, **options, what="training images", light=LIGHT)
                val = look_at_images(network, val_set, **options, what="validation images")
            except Stopped:
                return False
            calibration = fit(train, val, checkpoint)
            if name == "best.pth":
                report(val["logits"], val["labels"], calibration, folder)
        checkpoint["calibration"] = calibration
        save_checkpoint(checkpoint, path)
        before = checkpoint
    return True


def same_weights(one, other):
    """Whether two checkpoints of a run hold the same network for test.py."""
    one, other = (checkpoint.get("state_dict_ema") or checkpoint["state_dict"] for checkpoint in (one, other))
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.inference_mode()
def look_at_images(network, dataset, transform, loader, normalise, interrupt, what, light=1.0):
    """What `fit` needs to know of images.

    Args:
        light: above 1, the look of each image is also taken with all its values times a random factor, from 1 / light
            to light.

    Returns:
        dict of float32 tensors on the CPU: logits (N, classes), features (N, D) or None, look (N, 2 C) or None, or
        (2 N, 2 C) with `light`; and labels (N,), int64.

    Raises:
        Stopped: after a signal.
    """
    dataset = copy.copy(dataset)
    dataset.transform = transform
    if dataset.cache is not None and not fits(dataset.cache, transform):  # images grow in training, or in validation
        dataset.cache = None
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), MAX_IMAGES)).round().astype(int)).tolist()
    options = dict(num_workers=loader.num_workers, wait_minutes=loader.wait_minutes, what=what)
    batches = Loader(Subset(dataset, chosen), loader.batch_size, **options)
    parts = dict(logits=[], features=[], look=[], labels=[])
    device, has_features, generator = next(network.parameters()).device, True, torch.Generator().manual_seed(0)

    def prepare(images):
        return normalise(images.to(device)).contiguous(memory_format=choose_layout(device))

    for pixels, labels in Progress(batches, desc=f"calibration, {what}", unit="batch", leave=False):
        images = prepare(pixels)
        try:
            maps, (first,) = network.forward_intermediates(images, indices=[0])
            features, look = network.forward_head(maps, pre_logits=True), describe_look(first)
            logits = network.forward_head(maps)
            has_features = has_features and torch.is_tensor(maps) and features.dim() == 2
            if light > 1:
                images = prepare(change_light(pixels, light, generator))
                (first,) = network.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
                look = torch.cat([look, describe_look(first)])
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError, NotImplementedError):
            # Some of timm's networks have no such maps, or a head of another kind.
            logits, has_features = network(images), False
        for name, tensor in dict(logits=logits, labels=labels).items():
            parts[name].append(tensor.cpu())
        if has_features:
            parts["features"].append(features.float().cpu())
            parts["look"].append(look.float().cpu())
        if interrupt.signal:
            raise Stopped
    parts = {name: torch.cat(tensors) if tensors else None for name, tensors in parts.items()}
    return parts if has_features else parts | dict(features=None, look=None)


def change_light(pixels, largest, generator):
    """uint8 images (N, 3, H, W), each times a random factor, from 1 / `largest` to `largest`."""
    factors = largest ** (2 * torch.rand(len(pixels), 1, 1, 1, generator=generator) - 1)
    return (pixels * factors).round().clamp(max=255).to(torch.uint8)


def fits(cache, transform):
    """Whether cached images have the size that `transform` would give them."""
    pixels = cache.get(0)
    return pixels is not None and transform.resize(pixels).size == pixels.size


def fit(train, val, checkpoint):
    """The calibration of a network.

    Args:
        train, val: from `look_at_images`.
        checkpoint: which it is for.

    Returns:
        What a checkpoint holds under "calibration": plain types and tensors.
    """
    score = fit_score(train, val, len(checkpoint["classes"]))
    if score is None:
        print("calibration the features of this network give no score, so test.py calls nothing unknown")
    return dict(
        temperature=fit_temperature(val["logits"], val["labels"]),
        images=len(val["labels"]),
        img_size=checkpoint["img_size"],
        score=score,
    )


def fit_temperature(logits, labels):
    """The temperature with the smallest negative log-likelihood of the labels, which is convex in its reciprocal.

    As in Platt's scaling, a label counts as if one more image had any class with the same probability: otherwise images
    without a mistake, such as the few of a small set, would have a temperature of 0.

    Args:
        logits: float tensor (N, classes).
        labels: int tensor (N,).
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    own, every = logits.gather(1, labels[:, None]).mean(), logits.mean()
    wanted = own + (every - own) / (len(labels) + 2)

    def loss(log_temperature):
        scale = np.exp(-log_temperature)
        return float(torch.logsumexp(scale * logits, 1).mean() - scale * wanted)

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def cross_fit(logits, labels):
    """Probabilities (N, classes) of images by temperatures that were fitted without them: in `FOLDS` parts, each by
    that of the others; fewer images are a part each. Figures about them do not flatter, unlike those of a temperature
    fitted on the same images. At least two images."""
    from sklearn.model_selection import KFold

    probabilities = torch.empty(logits.shape, dtype=torch.float64)
    for others, part in KFold(min(FOLDS, len(labels)), shuffle=True, random_state=0).split(logits):
        temperature = fit_temperature(logits[others], labels[others])
        probabilities[part] = (logits[part].double() / temperature).softmax(1)
    return probabilities


def fit_score(train, val, num_classes):
    """The statistics of a `NoveltyScore`; None if the network has no features, or such as have no distances.

    Both covariances are shrunk (Ledoit and Wolf, 2004). The relative Mahalanobis distance is the squared distance to
    the nearest class's mean under the classes' common covariance, less that to the mean of all images under the
    covariance of all. Both are diagonal in the discriminant directions of Fisher, and equal in those in which the
    classes do not differ: at most `num_classes` - 1 directions remain, and nothing else need be stored.

    Args:
        train, val: from `look_at_images`.
        num_classes: number of classes.
    """
    from scipy.linalg import LinAlgError, cholesky, eigh, inv
    from sklearn.covariance import ledoit_wolf

    if train["features"] is None or val["features"] is None:
        return None
    features, look = train["features"].double().numpy(), train["look"].double().numpy()
    labels = train["labels"].numpy()
    present = np.unique(labels)
    means = np.stack([features[labels == label].mean(0) for label in present])
    residuals = features - means[np.searchsorted(present, labels)]
    center, deviation = features.mean(0), look.std(0) + 1e-6
    try:
        covariance, _ = ledoit_wolf((look - look.mean(0)) / deviation, assume_centered=True)
        whitening = cholesky(inv(covariance), lower=True) / deviation[:, None]
        within, _ = ledoit_wolf(residuals, assume_centered=True)
        between = np.cov(features - residuals, rowvar=False, bias=True)
        count = features.shape[1]
        ratio, projection = eigh(between, within, subset_by_index=[max(0, count - num_classes + 1), count - 1])
    except (LinAlgError, ValueError):
        return None
    statistics = dict(look_mean=look.mean(0), look_whitening=whitening, projection=projection)
    statistics |= dict(means=means @ projection, center=center @ projection, spread=1 + ratio.clip(0))
    statistics |= dict(scale=np.array([[0.0, 0.0], [1.0, 1.0]]), quantiles=np.zeros(QUANTILES))
    statistics = {name: torch.from_numpy(np.ascontiguousarray(array)).float() for name, array in statistics.items()}
    batches = list(zip(val["look"].split(64), val["features"].split(64)))  # all at once would be N x classes x D values
    parts = torch.cat([NoveltyScore(statistics).parts(*batch) for batch in batches])
    middle, high = parts.quantile(0.5, 0), parts.quantile(0.9, 0)
    # Images may be alike, and what is alike differs by rounding: with the batch, the merged network, or onnxruntime.
    statistics["scale"] = torch.stack([middle, (high - middle).clamp(min=0.01)])  # in variances of training images
    raw = torch.cat([NoveltyScore(statistics).raw(*batch) for batch in batches])
    quantiles = np.quantile(raw.numpy(), np.linspace(0, 1, QUANTILES)) + ROUNDING
    statistics["quantiles"] = torch.from_numpy(quantiles).float()
    return statistics if all(tensor.isfinite().all() for tensor in statistics.values()) else None


def calibration_error(probabilities, labels, bins=BINS):
    """Expected calibration error: the mean absolute difference of confidence and accuracy, in bins of confidences.

    Args:
        probabilities: array (N, classes).
        labels: array (N,).
        bins: number of bins of the same width.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, confidence - correct)).sum() / len(labels))


def log_likelihood_loss(probabilities, labels):
    """Mean negative log-likelihood of labels (N,) under probabilities (N, classes)."""
    chosen = np.take_along_axis(np.asarray(probabilities), np.asarray(labels)[:, None], 1)
    return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def summarise(probabilities, labels):
    """Metrics of probabilities (N, classes): dict of ece, nll, and accuracy at `COVERAGES`, from 0 to 1."""
    coverage, accuracy = coverage_curve(probabilities, labels)
    at = {f"{part:g}": float(accuracy[np.searchsorted(coverage, part - 1e-9)]) for part in COVERAGES}
    ece, nll = calibration_error(probabilities, labels), log_likelihood_loss(probabilities, labels)
    return dict(ece=ece, nll=nll, accuracy_at_coverage=at)


def report(logits, labels, calibration, folder):
    """Print what calibration does on the validation images, cross-fitted, and write calibration.json and .png."""
    raw, fitted = logits.double().softmax(1).numpy(), cross_fit(logits, labels).numpy()
    before, after = summarise(raw, labels), summarise(fitted, labels)
    temperature, score = calibration["temperature"], calibration["score"]
    content = dict(temperature=temperature, images=len(labels), folds=min(FOLDS, len(labels)), before=before)
    content |= dict(cross_fitted=after, score=score is not None)
    path = folder.path / "calibration.json"
    folder.side_files.write(path, write_json, path, content)
    path = folder.path / "calibration.png"
    folder.side_files.write(path, plot_calibration, raw, fitted, labels.numpy(), path)
    print(
        f"\ncalibration temperature {temperature:.3f}; on {len(labels)} validation images, cross-fitted: ECE "
        f"{before['ece']:.3f} -> {after['ece']:.3f}, NLL {before['nll']:.3f} -> {after['nll']:.3f}"
    )
    at = after["accuracy_at_coverage"]
    print("            accuracy of the most confident " + ", ".join(f"{float(p):.0%}: {a:.1%}" for p, a in at.items()))
