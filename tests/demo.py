"""Classify 1,000 real CIFAR-10 test images with the weights that travel in the package, without network.

    python tests/demo.py

Prints accuracy, speed and a table of the model against its unshared twin, and writes a picture of predictions,
`output/predictions.png`. Exit code 0.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'  # read at import

import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from safetensors.torch import save  # noqa: E402

DATA = Path(__file__).parent / 'data'
OUTPUT = Path('output')
MODEL, TWIN = 'sharesnet164_cifar', 'resnet164_cifar'


def load_images():
    """The images, the index of each one's class, and the names of the classes."""
    meta = json.loads((DATA / 'cifar10_test_1000.json').read_text())
    sheet = Image.open(DATA / 'cifar10_test_1000.webp').convert('RGB')
    boxes = [(x, y, x + 32, y + 32) for y in range(0, sheet.height, 32) for x in range(0, sheet.width, 32)]
    return [sheet.crop(box) for box in boxes], meta['labels'], meta['classes']


@torch.inference_mode()
def classify(model, images, batch_size=100):
    """Index of the predicted class of each image, and images per second."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    predictions = []
    start = time.perf_counter()
    for i in range(0, len(images), batch_size):
        batch = torch.stack([transform(image) for image in images[i : i + batch_size]])
        predictions += model(batch).argmax(1).tolist()
        speed = len(predictions) / (time.perf_counter() - start)
        print(f'\rclassifying {len(predictions):5d} of {len(images)} images', end='', flush=True)
    print()
    return predictions, speed


@torch.inference_mode()
def speeds(models, rounds=5, batch_size=50):
    """Median images per second of each model, measured in turns on random images."""
    batch = torch.randn(batch_size, 3, 32, 32)
    seconds = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - start)
    return [batch_size / sorted(times[1:])[rounds // 2] for times in seconds]  # the first round warms up


def draw(images, labels, predictions, classes, path, per_class=10):
    """Save a grid, one row a class, with the true and the predicted label of each image; mistakes are red."""
    cell_w, cell_h, scale, margin = 76, 100, 2, 26
    picture = Image.new('RGB', (per_class * cell_w, len(classes) * cell_h + margin), 'white')
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()
    wrong = sum(y != p for y, p in zip(labels, predictions, strict=True))
    title = f'{MODEL}: {wrong} of {len(images)} wrong. Here the first {per_class} of each class: true / predicted'
    pen.text((6, 8), title, 'black', font)
    for row in range(len(classes)):
        members = [i for i, label in enumerate(labels) if label == row][:per_class]
        for column, i in enumerate(members):
            x, y = column * cell_w + 6, row * cell_h + margin
            mistake = predictions[i] != labels[i]
            if mistake:
                pen.rectangle((x - 4, y - 2, x + 67, y + 95), outline='red', width=3)
            picture.paste(images[i].resize((32 * scale, 32 * scale), Image.Resampling.NEAREST), (x, y + 2))
            pen.text((x, y + 67), classes[labels[i]], 'black', font)
            pen.text((x, y + 79), classes[predictions[i]], 'red' if mistake else 'green', font)
    path.parent.mkdir(exist_ok=True)
    (path.parent / '.gitignore').write_text('*\n')
    picture.save(path)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    images, labels, classes = load_images()
    model = timm.create_model(MODEL, pretrained=True).eval()
    print(f'loaded {MODEL}.{model.pretrained_cfg["tag"]} from the package')
    predictions, speed = classify(model, images)
    hits = sum(y == p for y, p in zip(labels, predictions, strict=True))
    print(f'accuracy: {100 * hits / len(images):.2f} % on {len(images)} images')
    print(f'speed: {speed:.0f} images/s on {torch.get_num_threads()} CPU threads, preprocessing included')

    models = {MODEL: model, TWIN: timm.create_model(TWIN).eval()}
    print(f'\n{"model":20s} {"parameters":>10s} {"file":>9s} {"images/s":>9s}')
    for (name, m), rate in zip(models.items(), speeds(list(models.values())), strict=True):
        parameters, size = sum(p.numel() for p in m.parameters()), len(save(m.state_dict()))
        print(f'{name:20s} {parameters:10,d} {size / 1e6:6.2f} MB {rate:9.0f}')

    path = OUTPUT / 'predictions.png'
    draw(images, labels, predictions, classes, path)
    print(f'\npredictions: {path}')


if __name__ == '__main__':
    main()
