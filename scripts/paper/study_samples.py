"""Parts C and D of the study: samples of whole systems, and of guidance schedules.

Guidance is tuned for each system by the Fréchet distance to the validation half; scores are against the test half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from scripts.paper.steps import Made, Runner, Step, Word
from scripts.paper.study_parts import Figures, Trial, dual_tokenizer, learning_rates, step_seconds
from scripts.paper.study_steps import BEST, Data
from scripts.paper.study_systems import CONSTANT, CTF_CLUSTERS, IAR2, IAR_CLUSTERS, SINGLES, Schedule, System, Tokenizer
from utils.config import UserError
from utils.npz import open_array
from utils.pictures import image_grid, save_picture

PICTURED = 2  # samples of each class in the picture, if there are so many
POINTS = ("images", "time")  # where systems are compared: after equal images, after equal time


@dataclass(frozen=True)
class Contender:
    """A system of part C: one GPT, or CTF's two, and the tokenizer that decodes its samples."""

    label: str
    stages: tuple[Trial, ...]
    decoder: Made

    @property
    def system(self) -> System:
        """What its guidance is chosen from."""
        return self.stages[0].system


@dataclass(frozen=True)
class Trained:
    """A contender's GPTs after one training, and where their weights lie."""

    contender: Contender
    runs: tuple[Step, ...]

    def weights(self, point: str) -> tuple[Made, ...]:
        """Of every stage: the best after equal images, or those kept at equal time."""
        if point == "images":
            return tuple(Made(run, BEST) for run in self.runs)
        kept = [sorted(run.path("run/snapshots").glob("epoch-*")) for run in self.runs]
        return tuple(Made(run, f"run/snapshots/{found[0].name if found else 'first'}/gpt.safetensors")
                     for run, found in zip(self.runs, kept, strict=True))

    def options(self, point: str) -> tuple[Made, Made, tuple[Word, ...]]:
        """First stage, decoder, and options for the second stage where there is one."""
        first, *second = self.weights(point)
        return first, self.contender.decoder, (("--fine-ckpt", *second) if second else ())


def contenders(data: Data, beyond: System | None, runner: Runner) -> tuple[dict[str, Contender], Figures]:
    """The systems by name, and the figures of the reconstructions that bound theirs.

    Of the single codebooks that one is taken whose reconstructions are nearest to the dual codebook's.
    """
    dual = dual_tokenizer(data)
    singles = [data.tokenizer(Tokenizer(f"single-{size}", "", "single", (size,))) for size in SINGLES]
    rebuilt = [data.reconstruction(tokenizer) for tokenizer in (dual, *singles)]
    judged = [data.judged(step, "test.npz") for step in rebuilt]
    runner.run([*rebuilt, *judged])
    nearest, found = 0, {}
    if not runner.dry:
        psnr = [step.json("test.json")["psnr"] for step in rebuilt]
        nearest = min(range(len(singles)), key=lambda index: abs(psnr[index + 1] - psnr[0]))
        found = {name: rebuilt[index].json("test.json") | judged[index].json("judged.json")["test"]
                 for name, index in (("dual", 0), ("single", nearest + 1))} | {"real": judged[0].json("judged.json")["real"]}
    single, size = singles[nearest], SINGLES[nearest]
    iar, ctf = data.code_map(single, "balanced", IAR_CLUSTERS), data.code_map(single, "coarse", CTF_CLUSTERS)
    cluster_loss = ("--cluster-weight", 1, "--cluster-size", size // IAR_CLUSTERS)

    def stage(name: str, options: tuple[Word, ...] = (), map_of: Step | None = None, file: str = "") -> Trial:
        code_map = ("--code-map", Made(map_of, f"map/{file}.safetensors")) if map_of else ()
        return Trial(data, System(name, name, options, guidance="constant", ranges=CONSTANT), single, code_map)

    rows = {
        "llamagen": Contender("LlamaGen", (stage("llamagen"),), Made(single)),
        "iar": Contender("IAR", (stage("iar", cluster_loss, iar, "code_map"),), Made(iar, "map")),
        "ctf": Contender("CTF", tuple(stage(f"ctf-{each}", (), ctf, f"{each}_map") for each in ("coarse", "fine")), Made(single)),
        "iar2": Contender("IAR2", (Trial(data, IAR2, dual),), Made(dual)),
    }
    if beyond:
        rows["beyond"] = Contender(f"IAR2, {beyond.label}", (Trial(data, beyond, dual),), Made(dual))
    return rows, found


def equal_time(seconds: Mapping[str, float], steps: int) -> dict[str, int]:
    """Steps of every system in the time of the fastest's whole training.

    seconds: of one step, of both stages where there are two; steps: of a whole training.
    """
    time = steps * min(seconds.values())
    return {name: max(min(round(time / value), steps), 1) for name, value in seconds.items()}


def scales(system: System, text: str) -> tuple[Word, ...]:
    """Guidance options of a range START:END."""
    start, end = text.split(":")
    return "--guidance", system.guidance, "--cfg-scale", start, *(() if system.guidance == "constant" else (end,))


def tuned(data: Data, trained: Mapping[str, Trained], runner: Runner) -> dict[str, Figures]:
    """For every system the range `range` with the lowest Fréchet distance to the validation half, and the whole `sweep`."""
    sweeps = {}
    for name, each in trained.items():
        system, (gpt, decoder, fine) = each.contender.system, each.options("images")
        sweeps[name] = data.sweep(name, gpt, decoder, "validation", system.ranges, ("--guidance", system.guidance, *fine), 0)
    runner.run(sweeps.values())
    if runner.dry:
        return {name: {"range": each.contender.system.ranges[0]} for name, each in trained.items()}
    figures = {name: swept(step) for name, step in sweeps.items()}
    return {name: {"range": min(found, key=lambda text: found[text]["frechet"]), "sweep": found}
            for name, found in figures.items()}


def swept(sweep: Step) -> Figures:
    """The judge's figures by range."""
    return {text: entry["figures"] for text, entry in sweep.json("sweep/sweep.json").items()}


def gallery(data: Data, samples: Mapping[str, Step]) -> Image.Image:
    """Draw samples of every class, a row for each step under its label, below real images."""
    with np.load(data.images.path("test.npz")) as real:
        images, labels, names = real["images"], real["labels"], real["class_names"].tolist()
    drawn = [open_array(step.path("samples.npz"), "arr_0") for step in samples.values()]  # classes in turn
    own = min(PICTURED, np.bincount(labels).min(), *(len(each) // len(names) for each in drawn))
    rows = [images[np.concatenate([np.flatnonzero(labels == label)[:own] for label in range(len(names))])]]
    rows += [np.concatenate([each[label :: len(names)][:own] for label in range(len(names))]) for each in drawn]
    titles = [name if not index else "" for name in names for index in range(own)]
    return image_grid(np.concatenate(rows), own * len(names), 2, ["real images", *samples], titles)


def timed_rate(step: Step) -> float:
    """Images a second of timed samples; raises UserError where an interruption left none to time."""
    rate = step.json("samples.rate.json")
    if "warm_images_per_second" not in rate:
        raise UserError(f"{step.folder} was interrupted near its end, and nothing was timed: delete that folder, start again.")
    return float(rate["warm_images_per_second"])


def part_c(data: Data, beyond: System | None, seeds: Sequence[int], rates: Sequence[float], runner: Runner) -> Figures:
    """Whole systems at matched reconstruction, after equal images and after equal time."""
    rows, reconstructions = contenders(data, beyond, runner)
    trials = {trial.system.name: trial for row in rows.values() for trial in row.stages}
    times, chosen = step_seconds(trials, runner), learning_rates(trials, rates, runner)
    seconds = {name: sum(times[trial.system.name]["seconds"] for trial in row.stages) for name, row in rows.items()}
    steps = equal_time(seconds, data.lengths.gpt_steps)
    trained = {(name, seed): Trained(row, tuple(trial.train(chosen[trial.system.name]["lr"], seed, keep=steps[name])
                                                for trial in row.stages)) for seed in seeds for name, row in rows.items()}
    runner.run(run for each in trained.values() for run in each.runs)
    guidance = tuned(data, {name: trained[name, seeds[0]] for name in rows}, runner)
    judged, timed, shown = {}, {}, {}
    for (name, seed), each in trained.items():
        guided = scales(each.contender.system, guidance[name]["range"])
        for point in POINTS:
            gpt, decoder, fine = each.options(point)
            samples = data.samples(f"{name}-{point}-seed{seed}", gpt, decoder, (*guided, *fine), seed)
            judged[name, seed, point] = data.judged(samples, "samples.npz")
            if (seed, point) == (seeds[0], "images"):
                shown[each.contender.label] = samples
        if seed == seeds[0]:
            gpt, decoder, fine = each.options("images")
            timed[name] = data.samples(f"{name}-timed", gpt, decoder, (*guided, *fine), seed, alone=True)
    runner.run([*judged.values(), *timed.values()])
    if runner.dry:
        return {}
    save_picture(gallery(data, shown), data.root / "study-C-samples.png")
    stages = {name: chosen[name] | times[name] for name in trials}
    return {"reconstructions": reconstructions, "steps": data.lengths.gpt_steps, "systems": {name: {
        "label": row.label, "stages": {trial.system.name: stages[trial.system.name] for trial in row.stages},
        "seconds": seconds[name], "steps_at_equal_time": steps[name], **guidance[name],
        "images_per_second": timed_rate(timed[name]),
        "seeds": {seed: {point: judged[name, seed, point].json("judged.json")["samples"] for point in POINTS} for seed in seeds}}
        for name, row in rows.items()}}


def part_d(data: Data, rows: Sequence[Schedule], seeds: Sequence[int], rates: Sequence[float], runner: Runner) -> Figures:
    """Guidance schedules on IAR2: figures along each one's scales, against the test half."""
    dual = dual_tokenizer(data)
    trial = Trial(data, IAR2, dual)
    lr = learning_rates({"iar2": trial}, rates, runner)["iar2"]["lr"]
    runs = {seed: trial.train(lr, seed) for seed in seeds}
    sweeps = {(row.name, seed): data.sweep(f"{row.name}-seed{seed}", Made(runs[seed], BEST), Made(dual), "test", row.ranges,
                                           row.options, seed) for row in rows for seed in seeds}
    runner.run(sweeps.values())
    if runner.dry:
        return {}
    return {row.name: {"label": row.label, "seeds": {seed: swept(sweeps[row.name, seed]) for seed in seeds}} for row in rows}
