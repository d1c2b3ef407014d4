"""Parts A and B of the study, and what all parts share: what is run, in what order, which figures are gathered.

What a system is given by trying (its learning rate) is chosen on the validation half; scores are of the test half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.paper.steps import Own, Runner, Step, Word
from scripts.paper.study_steps import Data
from scripts.paper.study_systems import ASSOCIATED, System, Tokenizer
from utils.run import read_metrics

Figures = dict[str, Any]
PILOT_SEED = 1000  # of no run that is scored


@dataclass(frozen=True)
class Trial:
    """A GPT of a system on a tokenizer's codes, to be trained with several seeds."""

    data: Data
    system: System
    tokenizer: Step
    code_map: tuple[Word, ...] = ()

    @property
    def options(self) -> tuple[Word, ...]:
        """What the trainer is told beside what all trials have in common."""
        return "--gpt-model", self.system.gpt_model, *self.code_map, *self.system.options

    def train(self, lr: float, seed: int, pilot: bool = False, keep: int = 0) -> Step:
        """One training."""
        return self.data.gpt(self.system.name, self.tokenizer, self.options, lr, seed, pilot, keep)

    def words(self) -> tuple[Word, ...]:
        """The training's options, to time a step of it; its speed does not depend on the learning rate."""
        return self.data.gpt_words(self.tokenizer, self.options, 1e-3)


def curve(gpt: Step, images: int) -> list[list[float]]:
    """Validation bits along a training: [images seen, bits] of each evaluation; images: in a step."""
    lines = read_metrics(gpt.path("run/metrics.jsonl"))
    return [[line["step"] * images, line["eval/bits_per_image"]] for line in lines if "eval/bits_per_image" in line]


def learning_rates(trials: Mapping[str, Trial], rates: Sequence[float], runner: Runner) -> dict[str, Figures]:
    """For every trial the learning rate `lr` with the fewest validation bits after a short training, and all `pilots`.

    A dry run takes the middle one.
    """
    pilots = {name: {rate: trial.train(rate, PILOT_SEED, pilot=True) for rate in rates} for name, trial in trials.items()}
    runner.run(step for row in pilots.values() for step in row.values())
    if runner.dry:
        return {name: {"lr": rates[len(rates) // 2]} for name in trials}
    tried = {name: {rate: curve(step, 1)[-1][1] for rate, step in row.items()} for name, row in pilots.items()}
    return {name: {"lr": min(bits, key=bits.__getitem__), "pilots": bits} for name, bits in tried.items()}


def step_seconds(trials: Mapping[str, Trial], runner: Runner) -> dict[str, Figures]:
    """For every trial the `seconds` of a training step and its `parameters`, measured in turn with nothing beside."""
    data = next(iter(trials.values())).data
    words = [word for name, trial in trials.items() for word in (f"system={name}", *trial.words())]
    step = Step(data.root, "times", f"{data.name}-{len(trials)}-systems", (
        "scripts/paper/step_times.py", "--out", Own("times.json"), *words), alone=True)
    runner.run([step])
    return dict.fromkeys(trials, {"seconds": 1.0}) if runner.dry else step.json("times.json")


def dual_tokenizer(data: Data) -> Step:
    """The frozen dual tokenizer of parts B to D: IAR2's of part A, with its first seed."""
    return data.tokenizer(ASSOCIATED)


def part_a(data: Data, rows: Sequence[Tokenizer], seeds: Sequence[int], vgg: str, runner: Runner) -> Figures:
    """Tokenizers: reconstructions of the test half; vgg: VGG16's weights for LPIPS, or empty."""
    made = {(row.name, seed): data.tokenizer(row, seed) for row in rows for seed in seeds}
    rebuilt = {key: data.reconstruction(tokenizer, vgg) for key, tokenizer in made.items()}
    judged = {key: data.judged(step, "test.npz") for key, step in rebuilt.items()}
    runner.run([*rebuilt.values(), *judged.values()])
    if runner.dry:
        return {}
    return {row.name: {"label": row.label, "beyond": row.beyond, "entries": sum(row.sizes), "seeds": {
        seed: rebuilt[row.name, seed].json("test.json") | judged[row.name, seed].json("judged.json")["test"] for seed in seeds}}
        for row in rows}


def part_b(data: Data, rows: Mapping[System, Sequence[int]], rates: Sequence[float], runner: Runner) -> Figures:
    """Paradigms on one frozen dual tokenizer: bits per image of the test half, by stream, without guidance.

    rows: the systems, each with its seeds.
    """
    tokenizer = dual_tokenizer(data)
    trials = {row.name: Trial(data, row, tokenizer) for row in rows}
    chosen = learning_rates(trials, rates, runner)
    runs = {(row.name, seed): trials[row.name].train(chosen[row.name]["lr"], seed)
            for row, seeds in rows.items() for seed in seeds}
    bits = {key: data.bits(run, tokenizer) for key, run in runs.items()}
    runner.run(bits.values())
    times = step_seconds(trials, runner)
    if runner.dry:
        return {}
    return {row.name: {"label": row.label, **chosen[row.name], **times[row.name], "seeds": {
        seed: bits[row.name, seed].json("bits.json") | {"curve": curve(runs[row.name, seed], data.batch)} for seed in seeds}}
        for row, seeds in rows.items()}
