"""What the study compares: one declaration a part, a row for each system, in the words of the commands."""

from dataclasses import dataclass

from scripts.paper.steps import Word


@dataclass(frozen=True)
class Tokenizer:
    """A row of part A."""

    name: str
    label: str
    quantizer: str
    sizes: tuple[int, ...]
    options: tuple[Word, ...] = ()
    init: str = "kmeans"
    """Start of its codebooks; k-means goes with the revival of codes that are never chosen."""
    beyond: bool = False
    """Whether the idea is not the paper's."""


@dataclass(frozen=True)
class System:
    """A row of part B or C: a GPT, and how its samples are guided."""

    name: str
    label: str
    options: tuple[Word, ...] = ()
    gpt_model: str = "GPT-tiny"
    guidance: str = "attention"
    ranges: tuple[str, ...] = ("1:1", "1:2", "1:3", "1:4", "1:6", "1.5:4")
    """Scales among which the validation half chooses."""


DUAL = (256, 1024)

# A. Is an associated dual codebook better than others of its budget?  All have two phases of the same losses and lengths.
A = (
    Tokenizer("single-1024", "single 1,024", "single", (1024,)),
    Tokenizer("single-4096", "single 4,096", "single", (4096,)),
    Tokenizer("single-16384", "single 16,384", "single", (16384,)),
    Tokenizer("product", "product 256 x 1,024 (unassociated)", "product", DUAL),
    Tokenizer("residual", "plain residual 256 + 1,024", "residual", DUAL),
    Tokenizer("associated", "associated 256 + 1,024 (IAR2)", "dual", DUAL, ("--interleave-gradients", "all")),
    Tokenizer("associated-book", "associated, stage 1's loss moves the codebook alone", "dual", DUAL,
              ("--interleave-gradients", "codebook")),
    Tokenizer("rotation", "associated, rotation trick", "dual", DUAL,
              ("--interleave-gradients", "all", "--gradient", "rotation"), beyond=True),
    Tokenizer("simvq-4096", "SimVQ 4,096", "simvq", (4096,), init="whitened", beyond=True),
)
ASSOCIATED = next(row for row in A if row.name == "associated")

# B. Which paradigm predicts the codes of one dual tokenizer best?  The head has one layer everywhere.
HEAD: tuple[Word, ...] = ("--head-layers", 1)
NO_CONTEXT: tuple[Word, ...] = ("--context", "none")
IAR2 = System("compressed", "+ compressed context (IAR2)", HEAD)
B = (
    System("independent", "independent", ("--paradigm", "independent")),
    System("alternating", "alternating", ("--paradigm", "alternating")),
    System("grouped", "grouped", ("--paradigm", "grouped")),
    System("hierarchical", "hierarchical, no context", (*HEAD, *NO_CONTEXT)),
    System("widened", "hierarchical, no context, widened to IAR2's parameters", (*HEAD, *NO_CONTEXT), "GPT-tiny-wide"),
    System("concatenated", "+ concatenated context", (*HEAD, "--context", "concatenated")),
    IAR2,
)

# Beyond the paper: each is IAR2 with one change, then what these suggest together; judged by B.
BEYOND = (
    System("conditional", "an MLP instead of the head's layers", ("--paradigm", "conditional")),
    System("narrow-head", "head of half the width", (*HEAD, "--head-width", 64)),
    System("qk-norm", "QK-norm", (*HEAD, "--qk-norm")),
    System("random-order", "RAR's annealed random order", (*HEAD, "--order", "random", "--order-anneal", 0.5, 0.75)),
    System("muon", "Muon", (*HEAD, "--optimizer", "muon")),
    System("conditional-muon", "MLP, QK-norm and Muon", ("--paradigm", "conditional", "--qk-norm", "--optimizer", "muon")),
    System("narrow-muon", "narrow head, QK-norm and Muon", (*HEAD, "--head-width", 64, "--qk-norm", "--optimizer", "muon")),
)

# C. End to end, each with its own guidance.
CONSTANT = ("1:1", "1.25:1.25", "1.5:1.5", "2:2", "3:3", "4:4")  # constant guidance of the systems with one codebook
SINGLES = (4096, 16384)  # of which that is taken whose reconstructions are nearest to the dual codebook's
IAR_CLUSTERS, CTF_CLUSTERS = 64, 128


@dataclass(frozen=True)
class Schedule:
    """A row of part D: a guidance schedule, and the scales that it is tried with."""

    name: str
    label: str
    options: tuple[Word, ...]
    ranges: tuple[str, ...]


SLOW, FAST = ("1:2", "1:3", "1:4", "1:6", "1:8", "1:12"), ("1:1.25", "1:1.5", "1:2", "1:2.5", "1:3", "1:4")
D = (
    Schedule("constant", "constant", ("--guidance", "constant"),
             ("1.25:1.25", "1.5:1.5", "2:2", "2.5:2.5", "3:3", "3.5:3.5")),
    Schedule("progressive", "progressive (w = 0)", ("--guidance", "progressive"), SLOW),
    Schedule("attention-0.05", "attention, w = 0.05 (IAR2)", ("--guidance", "attention", "--cfg-attention-weight", 0.05), SLOW),
    Schedule("attention-1", "attention, w = 1", ("--guidance", "attention", "--cfg-attention-weight", 1), FAST),
    Schedule("shuffled-1", "attention of other cells, w = 1", ("--guidance", "attention_shuffled", "--cfg-attention-weight", 1),
             FAST),
    Schedule("reversed", "reversed", ("--guidance", "reversed"), FAST),
    Schedule("equation18", "equation 18, rescaled", ("--guidance", "equation18_rescaled"),
             ("1:4", "1:6", "1:10", "1:16", "1:24", "1:36")),
    Schedule("power-cosine", "power-cosine", ("--guidance", "power_cosine"), ("1:4", "1:6", "1:9", "1:13", "1:18", "1:24")),
)
