"""What the examples share: drawn fields, crops and weeds on soil, with their masks and boxes."""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image, to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, prepare/
from common.files import write_json, write_text
from prepare.drawn_data import MIN_SIZE, SPECIES, draw_seedling

CLASSES = ("soil", "crop", "weed")
CROPS = ("Common wheat", "Maize", "Sugar beet")


def write_scenes(folder, counts, width, height, seed=0):
    """Write drawn fields as the files that people have, so that an example reads them as it reads real data.

        images/train/000.jpg, masks/train/000.png (the value is the class), boxes/train.json (COCO), classes.txt

    Args:
        folder: in which these are made.
        counts: {part: number of images}, such as dict(train=24, val=8).
        width, height: of the images in pixels.
        seed: another one gives other images.
    """
    folder, categories = Path(folder), [dict(id=i, name=name) for i, name in enumerate(CLASSES) if i]
    for part, count in counts.items():
        for kind in ("images", "masks"):
            Path(folder, kind, part).mkdir(parents=True, exist_ok=True)
        boxes, images = [], []
        for number in range(count):
            image, mask, corners, labels = draw_scene(f"{seed}/{part}/{number}", width, height)
            name = f"{number:03d}"
            to_pil_image(image).save(folder / "images" / part / f"{name}.jpg", quality=95)
            Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / "masks" / part / f"{name}.png")
            images.append(dict(id=number, file_name=f"{name}.jpg", width=width, height=height))
            for (x1, y1, x2, y2), label in zip(corners.tolist(), labels.tolist()):
                box = [x1, y1, x2 - x1, y2 - y1]
                about = dict(id=len(boxes) + 1, image_id=number, category_id=label, bbox=box, area=box[2] * box[3])
                boxes.append(about | dict(iscrowd=0))
        Path(folder, "boxes").mkdir(exist_ok=True)
        write_json(folder / "boxes" / f"{part}.json", dict(images=images, annotations=boxes, categories=categories))
    write_text(folder / "classes.txt", "\n".join(CLASSES) + "\n")


def draw_scene(key, width, height):
    """Draw two to five plants on soil; the same key gives the same image.

    Args:
        key: any text.
        width, height: in pixels.

    Returns:
        (float tensor (3, height, width) from 0 to 1; int64 tensor (height, width), indices into `CLASSES`;
        float tensor (plants, 4), boxes x1, y1, x2, y2; int64 tensor (plants,), their classes).
    """
    rng = random.Random(key)
    noise = np.random.default_rng(rng.getrandbits(32))
    grains = Image.fromarray(noise.integers(60, 130, (height // 3, width // 3), dtype=np.uint8)).resize((width, height))
    pixels = np.uint8(np.asarray(grains)[..., None] * [1.05, 0.95, 0.8])
    mask = np.zeros((height, width), dtype=np.int64)
    boxes, labels = [], []
    for _ in range(rng.randint(2, 5)):
        species = rng.choice(CROPS if rng.random() < 0.5 else [name for name in SPECIES if name not in CROPS])
        size = max(rng.randint(min(width, height) // 4, min(width, height) // 2), MIN_SIZE)
        plant = np.asarray(draw_seedling(species, rng, size))
        red, green, blue = plant.astype(int).transpose(2, 0, 1)
        leaves = 2 * green - red - blue > 40  # excess green (Woebbecke et al. 1995)
        rows, columns = np.nonzero(leaves)
        if len(rows) < 20:
            continue
        top, left = rng.randint(0, height - size), rng.randint(0, width - size)
        window = np.s_[top : top + size, left : left + size]
        label = 1 if species in CROPS else 2
        pixels[window][leaves] = plant[leaves]
        mask[window][leaves] = label
        boxes.append([left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1])
        labels.append(label)
    boxes = torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4))
    return to_tensor(pixels), torch.from_numpy(mask), boxes, torch.tensor(labels, dtype=torch.int64)
