"""The study's steps: from images to scores, at a size that two CPU cores can do many times over.

Everything that systems have in common is one step here: the images, the classifiers that teach and judge, the start of the
tokenizers, the codes.  What a system changes is handed in as options of the commands.
"""

from dataclasses import dataclass
from pathlib import Path

from scripts.paper.steps import Made, Own, Step, Word
from scripts.paper.study_systems import Tokenizer
from utils.config import Positive

IMAGES_OF = {"cifar10": 50_000, "fashion-mnist": 60_000}
UNCOMPILED: tuple[Word, ...] = ("--compile", "off")  # trainings of minutes: compiling them would take as long
IMAGES: tuple[Word, ...] = ("--image-size", 32, "--num-workers", 0)
BEST = "run/best/gpt.safetensors"  # by early stopping
DOWNSAMPLING = 4  # 8x8 cells: the head's 5x5 window covers 27% of the past


@dataclass(frozen=True)
class Lengths:
    """How long everything is trained, and on how much it is scored."""

    classifier_epochs: tuple[Positive, Positive] = (2, 3)
    """Epochs of teacher and judge."""
    tokenizer_steps: tuple[Positive, Positive] = (300, 900)
    """Steps of a tokenizer's two phases, of 16 images."""
    gpt_steps: Positive = 320
    """Steps of a GPT, of 64 images."""
    pilot_steps: Positive = 80
    """Steps of a GPT in the search for its learning rate."""
    evaluations: Positive = 4
    """Evaluations on the validation half along a GPT's training; the weights at each are kept."""
    per_class: Positive = 200
    """Samples of each class that are scored."""
    tuning_per_class: Positive = 100
    """Samples of each class by which guidance is tuned."""


@dataclass(frozen=True)
class Data:
    """One data set: its images and the two classifiers."""

    root: Path
    name: str
    files: tuple[str, str] = ("", "")
    """npz of training and of test images; empty: torchvision downloads them."""
    lengths: Lengths = Lengths()
    batch: int = 64
    """Images in a step of a GPT."""
    sampled: int = 250
    """Samples drawn at once."""

    @property
    def images(self) -> Step:
        """train.npz, validation.npz and test.npz."""
        given = ("--train", self.files[0], "--test", self.files[1]) if self.files[0] else ()
        return Step(self.root, "data", self.name, ("scripts/paper/study_data.py", "--data", self.name, *given, "--out", Own()))

    def classifier(self, role: str) -> Step:
        """role: teacher (the tokenizers' perceptual distance) or judge (of samples), of another width and seed."""
        teacher, judge = self.lengths.classifier_epochs
        options: tuple[Word, ...] = ("--seed", 1, "--epochs", teacher)
        if role == "judge":
            options = "--seed", 2, "--epochs", judge, "--widths", 48, 96, 128
        return Step(self.root, "classifier", f"{self.name}-{role}", (
            "evaluations/c2i/classifier.py", "--data-path", Made(self.images, "train.npz"), "--image-size", 32,
            *options, "--out", Own("classifier.safetensors")))

    @property
    def perceptual(self) -> tuple[Word, ...]:
        """The teacher as perceptual distance."""
        return "--perceptual-net", "classifier", "--perceptual-file", Made(self.classifier("teacher"), "classifier.safetensors")

    def tokenizer(self, row: Tokenizer, seed: int = 0) -> Step:
        """A tokenizer in two phases of the same losses, whatever its quantizer; dual ones share their first phase."""
        first, second = self.lengths.tokenizer_steps
        staged = row.quantizer == "dual"
        common: tuple[Word, ...] = (
            "tokenizer/tokenizer_image/vq_train.py", "--data-path", Made(self.images, "train.npz"), "--val-path",
            Made(self.images, "validation.npz"), "--val-limit", 1000, *IMAGES, *self.perceptual, "--recipe", "equal",
            "--vq-model", "VQ-4-small", "--quantizer", row.quantizer, "--codebook-sizes", *row.sizes, "--global-batch-size", 16,
            "--lr", 1e-3, "--lr-end", 1e-4, "--ema-decay", 0.99, "--no-random-crop", "--log-every", 50,
            "--checkpoint-every", 400, *UNCOMPILED, "--seed", seed, "--run-dir", Own())
        kind, label = ("-".join(map(str, (self.name, name, *row.sizes, f"seed{seed}"))) for name in (row.quantizer, row.name))
        care: tuple[Word, ...] = ("--revive-every", 50) if row.init == "kmeans" else ()
        start: tuple[Word, ...] = ("--codebook-init", row.init, "--kmeans-vectors", 32768, *care)
        begun = Step(self.root, "tokenizer", f"{kind}-first", (
            *common, "--stage", "semantic" if staged else "single", "--steps", first, *start, *(() if staged else row.options)))
        return Step(self.root, "tokenizer", label, (  # one without stages goes on with its own codebooks
            *common, "--stage", "dual" if staged else "single", "--steps", second, *(start if staged else care), *row.options,
            "--init-from", Made(begun)))

    def reconstruction(self, tokenizer: Step, vgg: str = "") -> Step:
        """PSNR, SSIM, usage on the test half, and the reconstructions; LPIPS where VGG16's weights are given."""
        perceptual = ("--perceptual-net", "vgg", "--perceptual-file", vgg) if vgg else self.perceptual
        return Step(self.root, "reconstruction", tokenizer.label, (
            "tokenizer/tokenizer_image/reconstruction_vq_ddp.py", "--vq-ckpt", Made(tokenizer), "--data-path",
            Made(self.images, "test.npz"), *IMAGES, *perceptual, "--out", Own("test.npz")))

    def judged(self, samples: Step, part: str) -> Step:
        """Fréchet distance, precision, recall and class accuracy of an npz against the test half."""
        return Step(self.root, "judged", samples.label, (
            "evaluations/c2i/judge.py", "--classifier", Made(self.classifier("judge"), "classifier.safetensors"),
            "--reference", Made(self.images, "test.npz"), "--samples", Made(samples, part), "--out", Own("judged.json")))

    def codes(self, tokenizer: Step, split: str) -> Step:
        """split: train, validation or test."""
        return Step(self.root, "codes", f"{tokenizer.label}-{split}", (
            "autoregressive/train/extract_codes_c2i.py", "--vq-ckpt", Made(tokenizer), "--data-path",
            Made(self.images, f"{split}.npz"), *IMAGES, "--augmentation", "none", "--code-path", Own("codes")))

    def code_map(self, tokenizer: Step, method: str, clusters: int) -> Step:
        """IAR's or CTF's map of a single codebook."""
        return Step(self.root, "map", f"{tokenizer.label}-{method}-{clusters}", (
            "tokenizer/tokenizer_image/rearrange.py", "--vq-ckpt", Made(tokenizer), "--method", method, "--clusters", clusters,
            "--out", Own("map")))

    def gpt_words(self, tokenizer: Step, options: tuple[Word, ...], lr: float) -> tuple[Word, ...]:
        """Options of a GPT's training on the codes of a tokenizer, but for its length and folder."""
        return ("--image-size", 32, "--downsample-size", DOWNSAMPLING, "--num-classes", 10, "--code-path",
                Made(self.codes(tokenizer, "train"), "codes"), "--data-parallel", "none", "--num-workers", 0, "--dropout", 0,
                "--global-batch-size", self.batch, "--lr", lr, "--warmup-steps", 50, "--ema-decay", 0.99, *UNCOMPILED, *options)

    def gpt(self, name: str, tokenizer: Step, options: tuple[Word, ...], lr: float, seed: int, pilot: bool = False,
            keep: int = 0) -> Step:
        """A GPT; `best` in its folder are the weights of the evaluation with the fewest bits on the validation half.

        The learning rate is constant and the weights are averaged, so that every evaluation along the training is as good an
        end as the last.  pilot: a short training to choose the learning rate by; keep: a step whose weights are kept too.
        """
        steps, evaluations = (self.lengths.pilot_steps, 1) if pilot else (self.lengths.gpt_steps, self.lengths.evaluations)
        kept = ("--keep-every", keep / (IMAGES_OF[self.name] // self.batch)) if keep else ()
        return Step(self.root, "pilot" if pilot else "gpt", f"{self.name}-{name}-lr{lr:g}-seed{seed}", (
            "autoregressive/train/train_c2i.py", *self.gpt_words(tokenizer, options, lr), "--val-code-path",
            Made(self.codes(tokenizer, "validation"), "codes"), "--eval-every", steps // evaluations, "--keep-best",
            "--steps", steps, "--log-every", 25, "--checkpoint-every", 200, *kept, "--seed", seed, "--run-dir", Own("run")))

    def bits(self, gpt: Step, tokenizer: Step, code_map: tuple[Word, ...] = ()) -> Step:
        """Bits per image of the test half, by stream."""
        return Step(self.root, "bits", gpt.label, (
            "autoregressive/train/evaluate_c2i.py", "--gpt-ckpt", Made(gpt, BEST), "--code-path",
            Made(self.codes(tokenizer, "test"), "codes"), *code_map, "--out", Own("bits.json")))

    def sweep(self, label: str, gpt: Made, decoder: Made, half: str, ranges: tuple[str, ...], options: tuple[Word, ...],
              seed: int) -> Step:
        """The judge's figures of samples along ranges of guidance, against a half: validation to choose by, test to report."""
        return Step(self.root, "sweep", f"{self.name}-{label}-{half}", (
            "scripts/paper/sweep_c2i.py", "--gpt-ckpt", gpt, "--vq-ckpt", decoder, "--per-class", self.lengths.tuning_per_class,
            "--batch-size", self.sampled, "--reference", Made(self.images, f"{half}.npz"), "--judge",
            Made(self.classifier("judge"), "classifier.safetensors"), "--seed", seed, "--decode", "eager", *options, "--ranges",
            *ranges, "--folder", Own("sweep")))

    def samples(self, label: str, gpt: Made, decoder: Made, options: tuple[Word, ...], seed: int,
                alone: bool = False) -> Step:
        """Samples to score, or with `alone` as many batches as a rate needs, by the decoding that suits the device."""
        # Ten classes.  Compiling takes longer than drawing so few; a rate leaves the batch that compiles out.
        count, eager = (4 * self.sampled // 10, ()) if alone else (self.lengths.per_class, ("--decode", "eager"))
        return Step(self.root, "samples", f"{self.name}-{label}", (
            "autoregressive/sample/sample_c2i_ddp.py", "--gpt-ckpt", gpt, "--vq-ckpt", decoder, "--per-class",
            count, "--batch-size", self.sampled, "--seed", seed, *eager, *options, "--out", Own("samples.npz")), alone=alone)
