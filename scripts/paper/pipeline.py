"""The paper's pipeline as steps: from images to the figures of a row, at the toy or the paper's scale.

A `Lab` knows what the command line and the scale say, and gives a step for each command.  Where a step depends on what another
one has measured, as the length of a training in equal time does, the lab notes the other one in `wanted` until it is done.
Systems, what is compared, are functions below.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from scripts.paper.results import Figures, Row, spelled
from scripts.paper.scales import TOY, TOY_BATCH, Scale
from scripts.paper.steps import Made, Own, Step, Word, in_order
from utils.config import UserError

T = TypeVar("T")
Words = tuple[Word, ...]

MEASURED = "MEASURED"  # in a command, the place of what is measured first
LEAST_STEPS = 20  # of a GPT, however short its time
VQ_TRAIN, TRAIN_C2I = "tokenizer/tokenizer_image/vq_train.py", "autoregressive/train/train_c2i.py"


@dataclass(frozen=True)
class Stage:
    """A GPT, and options for the code map that its codes go through."""

    gpt: Step
    code_map: Words = ()


@dataclass(frozen=True)
class System:
    """What is compared: trained models, and how they are sampled from."""

    tokenizer: Step
    """Whose codes the models have learnt."""
    stages: tuple[Stage, ...]
    """One, or CTF's two."""
    decoder: Made
    """The tokenizer that turns samples into images."""
    guidance: Words
    """Unless a table says otherwise."""
    sampling: Words = ()
    weights: str = "run"
    """Which weights of the first model, below the folder of its step."""

    @property
    def checkpoint(self) -> Made:
        """The first model."""
        return Made(self.stages[0].gpt, self.weights)


@dataclass(frozen=True)
class Lab:
    """The commands of one experiment at one scale, as steps."""

    name: str
    """The experiment's."""
    scale: Scale
    root: Path
    """Where everything goes."""
    row_size: str
    """Size of the model in the names of rows, for example B; at toy scale that of the published row beside it."""
    image_size: int
    """Side in pixels that codes are extracted at, of the published row at toy scale."""
    epochs: float
    """Of a GPT, of the published row at toy scale."""
    model: str
    """Size of the GPTs that are trained."""
    seed: int
    """Of GPT training and sampling."""
    seconds: float
    """Training time of a GPT at toy scale."""
    keep_every: float
    """Epochs between the weights that a GPT's training keeps for good."""
    tokenizer_length: int
    """In the scale's unit; see `Scale.tokenizer_shares`."""
    gpt_options: Words
    """More of all GPTs."""
    train_path: str
    val_path: str
    reference_path: str
    """Images and ADM's reference, empty where the command line says none."""
    models: tuple[str, ...]
    """Sizes that the command line wants in a figure; empty: the paper's."""
    window_size: int
    """Of table 6."""
    classifier: str
    """That selects samples at the paper's scale."""
    drawing_options: Words
    """More of the command that draws a figure or sweeps."""
    baselines: tuple[str, ...]
    """More tokenizers of table 13."""
    wanted: list[Step] = field(default_factory=list)
    """Steps that must be done before the experiment can be declared in full."""

    # What the command line must say.

    @property
    def toy(self) -> bool:
        """Whether this is the small scale."""
        return self.scale is TOY

    def _given(self, value: str, option: str, what: str) -> str:
        if not value:
            raise UserError(f"{option} is missing: give the path of {what}, or --scale toy for the bundled images.")
        return value

    @property
    def train(self) -> str:
        """Training images."""
        return self._given(self.train_path, "--data-path", "ImageNet's train folder")

    @property
    def validation(self) -> str:
        """Held-out images."""
        return self._given(self.val_path, "--val-path", "ImageNet's val folder")

    @property
    def reference(self) -> str:
        """What samples are compared with."""
        return self.validation if self.toy else self._given(self.reference_path, "--reference", "VIRTUAL_imagenet256_labeled.npz")

    @property
    def variant(self) -> str:
        """What tells GPTs of one codebook and the same options apart."""
        if self.toy:
            size = "" if self.model == "GPT-tiny" else f"{self.model.removeprefix('GPT-')}-"
            return f"{size}{self.seconds:g}s-seed{self.seed}"
        return f"{self.model.removeprefix('GPT-')}-{self.image_size}-{self.epochs:g}-seed{self.seed}"

    def but(self, model: str = "", seconds: float | None = None) -> "Lab":
        """The same lab for GPTs of another size, or at toy scale of another training time."""
        return dataclasses.replace(self, model=model or self.model, seconds=self.seconds if seconds is None else seconds)

    def known(self, step: Step, read: Callable[[Step], T]) -> T | None:
        """What a step has made, or None, noting the step, where it is not done."""
        if step.done:
            return read(step)
        if not any(MEASURED in each.words for each in in_order([step])):  # otherwise something else comes first
            self.wanted.append(step)
        return None

    def step(self, kind: str, label: str, *words: Word, parallel: bool = False, alone: bool = False) -> Step:
        """A step; parallel: whether all GPUs may work on it."""
        return Step(self.root, kind, label[:180], words, parallel and self.scale.processes, alone)

    # Images and tokenizers.

    def small_classifier(self, role: str) -> Made:
        """role: teacher (of the tokenizers) or judge (of samples); toy scale."""
        return Made(self.step("classifier", role, "evaluations/c2i/classifier.py", "--data-path", self.train, "--image-size", 32,
                              *self.scale.classifiers[role], "--out", Own("classifier.safetensors")), "classifier.safetensors")

    @property
    def perceptual(self) -> Words:
        """The perceptual distance, where it is not VGG16's."""
        teacher = self.scale.classifiers and self.small_classifier("teacher")
        return ("--perceptual-net", "classifier", "--perceptual-file", teacher) if teacher else ()

    def tokenizer(self, quantizer: str, *sizes: int, equal: bool = False) -> Step:
        """A tokenizer: a dual one in two stages, another in one.

        equal: the others too are trained twice, the second time from the first one's result: learning rate, Adam, averaging and
        discriminator start anew for all kinds, and no kind has loss terms that another lacks (--recipe equal).
        """
        lengths = [(self.scale.tokenizer_unit, int(share * self.tokenizer_length)) for share in self.scale.tokenizer_shares]
        words: Words = ("--data-path", self.train, "--val-path", self.validation, *self.scale.images, *self.perceptual,
                        *self.scale.tokenizer, "--codebook-sizes", *sizes, *(("--recipe", "equal") if equal else ()))
        label = f"{'equal-' if equal else ''}{quantizer}-{'-'.join(map(str, sizes))}"

        def phase(stage: str, end: str, length: Words, *more: Word) -> Step:
            kind = () if quantizer == "dual" else ("--quantizer", quantizer)
            return self.step("tokenizer", f"{label}{end}", VQ_TRAIN, "--stage", stage, *kind, *words, *length, *more,
                             "--run-dir", Own("run"), parallel=True)

        if quantizer == "dual":
            return phase("dual", "", lengths[1], "--init-from", Made(phase("semantic", "-semantic", lengths[0]), "run"))
        if equal:
            return phase("single", "", lengths[1], "--init-from", Made(phase("single", "-first", lengths[0]), "run"),
                         *self.scale.second_phase)
        return phase("single", "", lengths[2])

    @property
    def single(self) -> Step:
        """LlamaGen's tokenizer."""
        return self.tokenizer("single", self.scale.single)

    @property
    def dual(self) -> Step:
        """IAR2's tokenizer."""
        return self.tokenizer("dual", self.scale.semantic, self.scale.detail)

    def code_map(self, method: str, clusters: int) -> Step:
        """IAR's (balanced) or CTF's (coarse) clusters of the single codebook."""
        return self.step("map", f"{method}-{clusters}", "tokenizer/tokenizer_image/rearrange.py", "--vq-ckpt",
                         Made(self.single, "run"), "--method", method, "--clusters", clusters, "--out", Own("map"))

    def codes(self, tokenizer: Step, held_out: bool = False) -> Made:
        """Codes of the training images, or of the held-out ones, for likelihoods."""
        size = self.scale.images if self.toy else ("--image-size", self.image_size)
        images, augmentation = (self.validation, "none") if held_out else (self.train, self.scale.augmentation)
        name = f"{tokenizer.label}{'' if self.toy else f'-{self.image_size}'}{'-val' if held_out else ''}"
        return Made(self.step("codes", name, "autoregressive/train/extract_codes_c2i.py", "--vq-ckpt", Made(tokenizer, "run"),
                              *size, "--data-path", images, "--augmentation", augmentation, "--code-path", Own("codes"),
                              parallel=True), "codes")

    def reconstruction(self, tokenizer: Step | str) -> tuple[Figures, ...]:
        """PSNR, SSIM, LPIPS, usage, and at the paper's scale rFID; tokenizer: a training, or what --vq-ckpt takes."""
        weights: Word = Made(tokenizer, "run") if isinstance(tokenizer, Step) else tokenizer
        label = tokenizer.label if isinstance(tokenizer, Step) else spelled([tokenizer])
        made = self.step("reconstruction", label, "tokenizer/tokenizer_image/reconstruction_vq_ddp.py", "--vq-ckpt",
                         weights, "--data-path", self.validation, *self.scale.images, *self.perceptual,
                         "--out", Own("images.npz"), parallel=True)
        figures = Figures(Made(made, "images.json"))
        if self.toy:
            return (figures,)
        real = self.step("reference", "val256", "tokenizer/validation/val_ddp.py", "--data-path", self.validation,
                         "--image-size", 256, "--out", Own("val256.npz"))
        rfid = self.step("rfid", label, "evaluations/c2i/evaluator.py", Made(real, "val256.npz"),
                         Made(made, "images.npz"), "--json", Own("rfid.json"))
        return figures, Figures(Made(rfid, "rfid.json"), prefix="r")

    # GPTs.

    def gpt(self, tokenizer: Step, *options: Word, time_of: Words | None = None) -> Step:
        """Train a GPT; options: of train_c2i.py.

        time_of: train it as long as `epochs` take with these options instead (paper's scale; at toy scale all have `seconds`).
        """
        length = self.length(tokenizer, options, time_of)
        shown = MEASURED if length is None else f"{length:.9g}"
        variant = self.variant if self.toy or length is None else dataclasses.replace(self, epochs=length).variant
        return self.step("gpt", "-".join(filter(None, (tokenizer.label, spelled(options), variant))),
                         *self.training(tokenizer, options), "--steps" if self.toy else "--epochs", shown, "--seed", self.seed,
                         "--keep-every", f"{self.keep_every:g}", "--run-dir", Own("run"), parallel=True)

    def training(self, tokenizer: Step, options: Words) -> Words:
        """A GPT's training, but for its length, seed, what it keeps, and folder."""
        size: Words = () if self.toy else ("--image-size", self.image_size)
        return (TRAIN_C2I, "--gpt-model", self.model, *size, "--code-path", self.codes(tokenizer), *self.scale.gpt,
                *self.gpt_options, *options)

    def length(self, tokenizer: Step, options: Words, time_of: Words | None) -> float | None:
        """Steps (toy) or epochs of a training, see `gpt`; None where a rate that decides is not measured yet."""
        if self.toy:
            rate = self.rate(tokenizer, options)
            return None if rate is None else max(int(self.seconds * rate / TOY_BATCH), LEAST_STEPS)
        if time_of in (None, options):
            return self.epochs
        own, reference = self.rate(tokenizer, options), self.rate(tokenizer, time_of or ())
        return None if own is None or reference is None else round(self.epochs * own / reference, 1)

    def rate(self, tokenizer: Step, options: Words) -> float | None:
        """Images per second of a training, by a short run beside which nothing else runs; None: not measured yet."""
        label = "-".join(filter(None, (tokenizer.label, spelled(options), self.model)))
        return self.known(self.step("rate", label, *self.training(tokenizer, options), "--steps", 20, "--log-every", 10,
                                    "--run-dir", Own("run"), parallel=True, alone=True), last_rate)

    def snapshots(self, system: System) -> list[str]:
        """The epochs, as in the names of their folders, whose weights a training has kept; before it those that are expected."""
        if not self.keep_every:
            raise UserError("--keep-every 0 keeps no weights along a training, of which this figure is: give one above 0.")
        gpt = system.stages[0].gpt
        found = self.known(gpt, lambda step: sorted(path.name for path in step.path("run/snapshots").glob("epoch-*")))
        if found == []:
            raise UserError(f"{gpt.path('run')} has kept no weights: train longer, or with a smaller --keep-every than "
                            f"{self.keep_every:g}.")
        if found is None:
            expected = [count * self.keep_every for count in range(1, int(self.epochs / self.keep_every) + 1)]
            names = [f"{epoch:04.0f}" if epoch == int(epoch) else f"{epoch:07.2f}" for epoch in expected]
            return [MEASURED] if self.toy else names
        return [name.removeprefix("epoch-") for name in found]

    # Rows.

    @property
    def constant(self) -> Words:
        """Constant guidance of the ablations."""
        return "--guidance", "constant", "--cfg-scale", self.scale.constant_scale

    def guided(self, guidance: str) -> Words:
        """A guidance over the ablations' range."""
        return "--guidance", guidance, "--cfg-scale", *self.scale.range

    def samples(self, system: System, guidance: Words | None = None) -> Step:
        """An npz of samples."""
        guidance = system.guidance if guidance is None else guidance
        fine = [("--fine-ckpt", Made(stage.gpt, "run")) for stage in system.stages[1:]]
        gpt = system.stages[0].gpt.label + system.weights.removeprefix("run").replace("/snapshots/", "-")
        label = "-".join(filter(None, (gpt, spelled((*guidance, *system.sampling)))))
        return self.step("samples", label, "autoregressive/sample/sample_c2i_ddp.py", "--gpt-ckpt", system.checkpoint,
                         "--vq-ckpt", system.decoder, *self.scale.sample, "--seed", self.seed,
                         *(word for words in fine for word in words), *guidance, *system.sampling,
                         "--out", Own("samples.npz"), parallel=True)

    def judged(self, samples: Step) -> Figures:
        """ADM's five numbers, or at toy scale those of a small classifier."""
        if self.toy:
            words: Words = ("evaluations/c2i/judge.py", "--classifier", self.small_classifier("judge"), "--reference",
                            self.reference, "--samples", Made(samples, "samples.npz"), "--out", Own("judged.json"))
        else:
            words = "evaluations/c2i/evaluator.py", self.reference, Made(samples, "samples.npz"), "--json", Own("judged.json")
        return Figures(Made(self.step("judged", samples.label, *words), "judged.json"), keys=("samples",) if self.toy else ())

    def bits(self, system: System) -> tuple[Figures, ...]:
        """Bits per image on held-out codes, by stage."""
        return tuple(Figures(Made(self.step(
            "bits", stage.gpt.label, "autoregressive/train/evaluate_c2i.py", "--gpt-ckpt", Made(stage.gpt, "run"), "--code-path",
            self.codes(system.tokenizer, held_out=True), *stage.code_map, "--out", Own("bits.json"), parallel=True), "bits.json"))
            for stage in system.stages)

    def row(self, name: str, system: System, guidance: Words | None = None, bits: bool = False, reconstruction: bool = False,
            parameters: bool = False) -> Row:
        """A row: samples and their figures, and on request likelihood, the tokenizer's reconstruction, number of parameters."""
        samples = self.samples(system, guidance)
        return Row(name, (*(self.reconstruction(system.tokenizer) if reconstruction else ()), self.judged(samples),
                          # None where samples were selected.
                          Figures(Made(samples, "samples.rate.json"), optional=True), *(self.bits(system) if bits else ())),
                   Made(system.stages[0].gpt, "run") if parameters else None)

    def sweep(self, system: System, *options: Word) -> Step:
        """Guidance ranges of one system, the models loaded once."""
        judge: Words = ("--judge", self.small_classifier("judge")) if self.toy else ()
        return self.step("sweep", system.stages[0].gpt.label, "scripts/paper/sweep_c2i.py", "--gpt-ckpt", system.checkpoint,
                         "--vq-ckpt", system.decoder, *self.scale.sample, "--seed", self.seed, "--reference", self.reference,
                         *judge, *options, "--folder", Own("sweep"), parallel=True)


def last_rate(step: Step) -> float:
    """Images per second in the last line of a training's log; raises UserError where there is none."""
    lines = step.path("run/metrics.jsonl").read_text().splitlines()
    try:
        return float(json.loads(lines[-1])["images_per_second"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{step.folder} holds no rate: remove the folder, and it is measured again.") from error
