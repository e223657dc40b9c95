"""The dirt of the web split: captions that say nothing, captions in other languages, and damaged pictures."""

import io

import numpy as np
from PIL import Image

LANGUAGES: dict[str, tuple[str, ...]] = {
    "de": (
        "Ein schönes Bild mit bunten Zeichen auf dunklem Grund.",
        "Hier sieht man mehrere farbige Symbole nebeneinander.",
        "Das ist eine kleine Zeichnung, die wir gestern gemacht haben.",
        "Ein Hintergrundbild für den Schreibtisch, kostenlos herunterladen.",
        "Drei Figuren und ein Stern auf gestreiftem Papier.",
    ),
    "fr": (
        "Une belle image avec des symboles de toutes les couleurs.",
        "Voici un petit dessin que nous avons fait hier soir.",
        "Plusieurs objets colorés sur un fond sombre.",
        "Fond d'écran gratuit à télécharger pour votre ordinateur.",
        "Un parapluie et une étoile, dessinés par les enfants.",
    ),
    "es": (
        "Una imagen bonita con símbolos de muchos colores.",
        "Aquí se ven varios objetos pequeños sobre un fondo oscuro.",
        "Este es el dibujo que hicimos ayer por la tarde.",
        "Fondo de pantalla gratis para descargar en su ordenador.",
        "Dos estrellas y un paraguas pintados por los niños.",
    ),
    "it": (
        "Una bella immagine con simboli di tutti i colori.",
        "Qui si vedono alcuni oggetti piccoli su uno sfondo scuro.",
        "Questo è il disegno che abbiamo fatto ieri sera.",
        "Sfondo gratuito da scaricare per il vostro computer.",
    ),
    "pt": (
        "Uma imagem bonita com símbolos de muitas cores.",
        "Aqui vemos vários objetos pequenos sobre um fundo escuro.",
        "Este é o desenho que fizemos ontem à tarde.",
    ),
    "nl": (
        "Een mooie afbeelding met gekleurde tekens op een donkere achtergrond.",
        "Hier zie je verschillende kleine voorwerpen naast elkaar.",
        "Dit is de tekening die wij gisteren hebben gemaakt.",
    ),
    "ru": (
        "Красивая картинка с разноцветными знаками на тёмном фоне.",
        "Здесь видно несколько маленьких предметов.",
        "Этот рисунок мы сделали вчера вечером.",
        "Обои для рабочего стола, скачать бесплатно.",
    ),
    "zh": (
        "一张漂亮的图片，深色背景上有彩色的符号。",
        "这里可以看到几个小东西。",
        "这是我们昨天晚上画的画。",
        "免费下载的电脑壁纸。",
    ),
    "ja": (
        "暗い背景に色とりどりの記号がある絵です。",
        "昨日の夜に描いた小さな絵です。",
        "無料でダウンロードできる壁紙。",
    ),
    "ar": ("صورة جميلة فيها رموز ملونة على خلفية داكنة.", "هذه هي اللوحة التي رسمناها أمس."),
}

_BOILERPLATE = (
    "IMG_{n}.jpg",
    "DSC{n}.JPG",
    "photo {n}",
    "image-{n}-large.png",
    "Screenshot {n}",
    "untitled",
    "Click to enlarge",
    "click here to view the full size image",
    "stock photo",
    "Royalty free stock photo {n}",
    "Stock vector illustration, id {n}",
    "Buy this print online now!",
    "Free shipping on all orders over ${n}",
    "thumbnail",
    "image may be subject to copyright",
    "Copyright © 20{m}. All rights reserved.",
    "Loading...",
    "Download wallpaper {n} x {n}",
    "https://images.example/view?id={n}",
    "posted by admin on 20{m}-03-0{d}",
)


def boilerplate(generator: np.random.Generator) -> str:
    pattern = _BOILERPLATE[int(generator.integers(len(_BOILERPLATE)))]
    n, m, d = generator.integers(1000, 9999), generator.integers(10, 25), generator.integers(1, 10)
    return pattern.format(n=n, m=m, d=d)


def other_language(generator: np.random.Generator) -> str:
    sentences = LANGUAGES[tuple(LANGUAGES)[int(generator.integers(len(LANGUAGES)))]]
    return sentences[int(generator.integers(len(sentences)))]


def broken(jpeg: bytes, generator: np.random.Generator) -> bytes:
    """A file that stops early, or whose bytes are no picture at all (an error page, noise, nothing)."""
    form = int(generator.integers(4))
    if form == 0:
        return b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>"
    if form == 1:
        return generator.bytes(int(generator.integers(200, 2000)))
    if form == 2:
        return jpeg[:2] + generator.bytes(len(jpeg) // 2)
    return jpeg[: int(len(jpeg) * generator.uniform(0.2, 0.8))]


def tiny(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    side = int(generator.integers(12, 41))
    return image.resize((side, side), Image.Resampling.BILINEAR)


def extreme(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Stretched to between 5 : 1 and 8 : 1, lying or standing."""
    ratio = generator.uniform(5, 8)
    short = int(generator.integers(64, 81))
    size = (round(short * ratio), short)
    return image.resize(size if generator.integers(2) else size[::-1], Image.Resampling.BILINEAR)


def resized(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The size at which another site would serve the same picture."""
    side = round(image.width * generator.uniform(0.85, 1.2))
    return image.resize((side, side), Image.Resampling.BILINEAR)


def encode_jpeg(image: Image.Image, quality: int = 92, subsampling: int = 0) -> bytes:
    """Full-resolution colour by default: thin coloured strokes lose their colour otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()
