"The stored figures of all notebooks, and nbs/images, no larger than they need be to be looked at."
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WIDTH, COLOURS = 860, 128 # pixels of the widest figure, colours of a photograph


def palette_of(image: Image.Image) -> Image.Image:
    "Colours for what is not white, and white itself, from a sample of the pixels"
    pixels = np.asarray(image).reshape(-1, 3)
    drawn = pixels[(pixels < 255).any(1)] if (pixels < 255).any() else pixels
    side = 256
    sample = drawn[np.linspace(0, len(drawn) - 1, side*side).astype(int)].reshape(side, side, 3)
    chosen = Image.fromarray(sample).quantize(COLOURS - 1, method=Image.Quantize.MEDIANCUT, kmeans=1)
    found = Image.new('P', (1, 1))
    found.putpalette(chosen.getpalette()[:3*(COLOURS - 1)] + [255, 255, 255])
    return found


def dithered(image: Image.Image) -> Image.Image:
    "`image` in `COLOURS` colours: without dithering, overlays on photographs would show steps; the paper stays white"
    found = image.quantize(palette=palette_of(image), dither=Image.Dither.FLOYDSTEINBERG)
    is_white = Image.fromarray((np.asarray(image)==255).all(2))
    found.paste(COLOURS - 1, mask=is_white)
    return found


def small(png: bytes) -> bytes:
    "`png` no wider than `WIDTH`, and with `COLOURS` (dithered: overlays on photographs would show steps) where this takes less"
    image = Image.open(io.BytesIO(png))
    if image.mode=='P' and image.width <= WIDTH: return png
    image = image.convert('RGBA')
    paper = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(paper, image).convert('RGB')
    was_narrow = image.width <= WIDTH
    if not was_narrow: image = image.resize((WIDTH, round(image.height*WIDTH/image.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    dithered(image).save(file, 'PNG', optimize=True)
    return min(file.getvalue(), png, key=len) if was_narrow else file.getvalue() # drawings of few colours are small as they are


def figures(text: str) -> list[str]:
    "The PNG outputs in the text of a notebook, as they are written there"
    outputs = [out for cell in json.loads(text)['cells'] for out in cell.get('outputs', [])]
    return [''.join(out['data']['image/png']).strip() for out in outputs if 'image/png' in out.get('data', {})]


def shrunk(text: str) -> str:
    "The text of a notebook with small figures, and not a letter of it changed elsewhere"
    for old in figures(text): text = text.replace(old, base64.b64encode(small(base64.b64decode(old))).decode())
    return text


def write() -> None:
    "Shrink the figures of every notebook, and the images"
    for file in sorted((ROOT/'nbs').rglob('*.ipynb')):
        old = file.read_text(encoding='utf-8')
        new = shrunk(old)
        if new != old: file.write_text(new, encoding='utf-8')
        if new != old: print(f'{file.relative_to(ROOT)}: {len(old)//1024} -> {len(new)//1024} KB')
    for file in sorted((ROOT/'nbs/images').glob('*.png')):
        old = file.read_bytes()
        if small(old) != old: file.write_bytes(small(old))


if __name__=='__main__': write()
