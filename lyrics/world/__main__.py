"""Draw one scene that is in no split: `python -m lyrics.world OUT.png --seed N` prints a question and its answer."""

import argparse
from pathlib import Path

from lyrics import seeding
from lyrics.world import scenes
from lyrics.world.questions import questions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lyrics.world", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--seed", type=int, default=0, help="which scene; none of them is in any split")
    arguments = parser.parse_args()
    scene = scenes.sample_scene(seeding.rng("demo", arguments.seed), "demo")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    scenes.render(scene).save(arguments.out)
    question = questions(scene, seeding.rng("demo question", arguments.seed), 1)[0]
    print(f"{question.text} {question.answer}")


if __name__ == "__main__":
    main()
