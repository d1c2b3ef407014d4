"""Features of captions: encoders, extraction, the data set that joins them with codes, and the CLIP score."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from autoregressive.train import extract_codes_c2i, extract_text
from evaluations.t2i import clip_score
from tests.conftest import call, command, export_models
from tests.test_captions import SHADES, WORDS, png, write_listed, write_npz
from tests.test_codes import extract_options, refused, write_codes
from tests.test_npz import ALONE
from utils.config import UserError
from utils.shards import require_fit
from utils.text_encoders import TEXT_ENCODERS, CaptionEncoder, EncoderRecord, TextEncoderOptions, encoder_of, make_encoder
from utils.text_shards import CaptionedCodes, TextHeader, TextWriter, open_text, read_text_header

CPU = torch.device("cpu")
VOCABULARY = ["a", "square", "dark", "grey", "light", "white", "cat", "dog", "the", "of"]


def write_tokenizer(folder: Path, end: str) -> None:
    """A tokenizer of whole words that appends an end token, as `transformers` saves one."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    ids = {token: number for number, token in enumerate(["<pad>", end, "<unk>", *VOCABULARY])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, ids[end])])
    named = dict(pad_token="<pad>", eos_token=end, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def write_t5(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """A tiny T5 encoder with random weights and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=16, d_model=width, d_kv=4, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
                                   eos_token_id=1, decoder_start_token_id=0)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    write_tokenizer(folder, "</s>")
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """The folder of a tiny T5."""
    return write_t5(tmp_path_factory.mktemp("t5"))


def options_of(kind: str, t5: Path, **changed) -> TextEncoderOptions:
    """Options of a small encoder of each kind."""
    own: dict = {"text_encoder_path": str(t5)} if kind == "t5" else {"text_width": 32}
    return TextEncoderOptions(**{"text_encoder": kind, "text_length": 6} | own | changed)


def words(options: TextEncoderOptions) -> list[object]:
    """The command line of encoder options."""
    named = vars(options).items()
    return [word for name, value in named if value for word in (f"--{name.replace('_', '-')}", value)]


def extract(data: Path, out: Path, options: TextEncoderOptions, *more: object) -> Path:
    """Extract the features of a data set in this process."""
    call(extract_text.main, "--data-path", data, "--text-path", out, "--batch-size", 2, "--device", "cpu", *words(options), *more)
    return out


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_captions_are_padded_on_the_left_and_alone(kind, t5):
    """A caption's features depend on no other caption of its batch, stand before the codes, and are zero where padded."""
    encoder = make_encoder(options_of(kind, t5), CPU, False)
    together, mask = encoder(["a dark square", "a cat", "the dog of a cat"])
    assert together.shape == (3, 6, encoder.record.text_width) and together.dtype == torch.float32
    assert mask.tolist() == [[False] * 2 + [True] * 4, [False] * 3 + [True] * 3, [True] * 6]
    assert not together[~mask].any() and together[mask].abs().sum(-1).min() > 0
    for row, text in enumerate(["a dark square", "a cat", "the dog of a cat"]):
        alone, alone_mask = encoder([text])
        assert torch.equal(alone_mask[0], mask[row]) and torch.allclose(alone[0], together[row], atol=1e-2)
    assert torch.equal(together, together.bfloat16().float())


def test_t5_sees_what_transformers_gives_it(t5):
    """The last hidden states of the cleaned words, with the end token: the order of words and the attention mask are T5's own."""
    from transformers import AutoTokenizer, T5EncoderModel

    features, mask = make_encoder(options_of("t5", t5), CPU, False)(["A  DARK square"])
    tokens = AutoTokenizer.from_pretrained(t5)("a dark square", return_tensors="pt")
    expected = T5EncoderModel.from_pretrained(t5)(input_ids=tokens["input_ids"]).last_hidden_state[0]
    assert tokens["input_ids"].tolist() == [[3, 5, 4, 1]]
    assert torch.allclose(features[0][mask[0]], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_a_caption_beyond_the_length_is_cut_and_said_once(kind, t5, caplog):
    """The end token stays; a line of the log for each of a million captions would hide everything else."""
    encoder = make_encoder(options_of(kind, t5, text_length=4), CPU, False)
    for _ in range(2):
        features, mask = encoder(["a dark square of the cat", "a dog"])
    assert features.shape[1] == 4 and mask.sum(1).tolist() == [4, 3]
    assert caplog.text.count("1 of 2 captions are longer than --text-length 4 tokens and are cut") == 1


def test_hashed_words_stay_near_their_misspellings():
    """What the encoder is for: classes and properties under typos, and other orders of the same words, without a download."""
    encoder = make_encoder(TextEncoderOptions("hashed", text_length=8), CPU, False)
    features, _ = encoder(["trouser", "trousr", "trowser", "dress", "bright"])
    word = torch.nn.functional.normalize(features[:, -2], dim=-1)  # the last is the end token
    near, far = (word[0] @ word[1:3].T).min(), (word[0] @ word[3:].T).max()
    assert near > 0.3 > 0.25 > far
    order, _ = encoder(["dark coat on a bright dress", "bright coat on a dark dress"])
    assert not torch.allclose(order[0, -7:-1], order[1, -7:-1])


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_a_record_gives_back_its_encoder_and_no_other(kind, t5, tmp_path):
    """A sampler has only what the model carries; features of another encoder would be noise to it."""
    made = make_encoder(options_of(kind, t5, caption_cleaning="mended"), CPU, False)
    again = encoder_of(made.record, "--gpt-ckpt x", CPU, False)
    assert EncoderRecord.of(made.record.text, "x") == again.record == made.record
    assert torch.equal(again(["a cat"])[0], made(["a cat"])[0])
    assert make_encoder(options_of(kind, t5), CPU, True).record.encoder_fingerprint == made.record.encoder_fingerprint
    with pytest.raises(UserError, match="but --gpt-ckpt x was trained with"):
        encoder_of(replace(made.record, encoder_fingerprint="0" * 16), "--gpt-ckpt x", CPU, False)
    if kind == "t5":
        with pytest.raises(UserError, match="holds an encoder with the fingerprint"):
            encoder_of(made.record, "--gpt-ckpt x", CPU, False, str(write_t5(tmp_path / "other", seed=1)))
    for damaged in ("google/flan-t5-xl", "{}", made.record.text.replace("6", '"6"')):
        with pytest.raises(UserError, match="--gpt-ckpt x: its text encoder"):
            EncoderRecord.of(damaged, "--gpt-ckpt x")
    with pytest.raises(UserError, match="the text encoder clip, which is unknown here"):
        encoder_of(replace(made.record, encoder="clip"), "--gpt-ckpt x", CPU, False)


@pytest.mark.parametrize("changed, sentence", [
    (dict(text_encoder="hashed", text_encoder_path="x"), "--text-encoder-path x is an option of --text-encoder t5, not of ha"),
    (dict(text_width=8), "--text-width 8 is an option of --text-encoder hashed, not of t5: leave it out."),
    (dict(text_encoder_path="/nowhere/t5"), "--text-encoder-path /nowhere/t5 cannot be loaded"),
])
def test_options_of_another_encoder_are_refused(changed, sentence):
    """An option that nothing reads is a promise that nobody keeps; a folder that is not there is no traceback."""
    with pytest.raises(UserError, match=sentence):
        make_encoder(TextEncoderOptions(**changed), CPU, False)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    """The package is needed for this encoder alone, and imported late."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--text-encoder t5 needs the package transformers.*`pip install transformers`"):
        make_encoder(TextEncoderOptions(), CPU, False)


# --- extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXT_ENCODERS)
def test_what_is_extracted_is_what_the_encoder_gives(kind, t5, tmp_path):
    """Training on disk features and sampling from the encoder must be the same condition, number by number."""
    text = extract(write_npz(tmp_path / "data"), tmp_path / "text", options_of(kind, t5), "--short-captions", "short")
    header, features, starts, lengths, state = open_text(text)
    encoder = encoder_of(header.record, "x", CPU, False)
    assert lengths.tolist() == [[4, 2]] * 4 and state.tolist() == [1] * 4 and features.shape == (24, header.text_width)
    for crop, captions in enumerate((WORDS, [caption.split()[1] for caption in WORDS])):
        expected, mask = encoder(captions)
        for row in range(4):
            stored = torch.from_numpy(features[starts[row, crop] :][: lengths[row, crop]].copy()).view(torch.bfloat16).float()
            assert torch.allclose(stored, expected[row][mask[row]], atol=1e-2)


def test_two_processes_extract_as_one_and_carry_on(tmp_path):
    """What was done is kept whoever did it; counting tokens again would take an hour, so the stored lengths are used."""
    data, options = write_listed(tmp_path / "data"), options_of("hashed", Path())
    one = extract(data, tmp_path / "one", options)
    line = ["--data-path", data, "--text-path", tmp_path / "two", "--batch-size", 2, "--device", "cpu", *words(options)]
    command("autoregressive/train/extract_text.py", *line, processes=2)
    for name in ("features.npy", "lengths.npy", "state.npy", "header.json"):
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    state = np.lib.format.open_memmap(one / "state.npy", mode="r+")
    features = np.lib.format.open_memmap(one / "features.npy", mode="r+")
    whole = features.copy()
    state[1], features[:8] = 0, 0  # row 1 is missing, row 0 is spoilt and is not done again
    state.flush(), features.flush()
    extract(data, one, options)
    assert np.array_equal(np.load(one / "features.npy")[4:], whole[4:]) and not np.load(one / "features.npy")[:4].any()


def test_empty_and_long_captions_are_counted(tmp_path, capsys):
    """A file's name for a caption is cleaned away: such images are left out of training, and the user is told how many."""
    lines = [json.dumps({"image_path": f"pictures/{number}.png", "text": text})
             for number, text in enumerate(["IMG_2031.JPG", "a cat", "a dark square of the light dog", "a dog. and more"])]
    text = extract(write_listed(tmp_path / "data", *lines), tmp_path / "text", options_of("hashed", Path()), "--short-captions",
                   "first-sentence")
    assert open_text(text).lengths.tolist() == [[0, 0], [3, 3], [6, 6], [5, 3]] and open_text(text).state.tolist() == [2, 1, 1, 1]
    said = capsys.readouterr().err
    assert "1 of 4 captions are longer than --text-length 6 tokens and are cut; the first begins 'a dark square" in said
    assert "1 of 4 captions are empty after cleaning and are left out; the first was 'IMG_2031.JPG'" in said


def test_extraction_is_refused_in_one_sentence(capsys, images_folder, tmp_path):
    """No captions, only empty ones, other captions or another encoder in a folder that was begun: before the encoder works."""
    options, data = options_of("hashed", Path()), write_npz(tmp_path / "data")
    line = ["--text-path", tmp_path / "text", "--device", "cpu", *words(options)]
    assert "has no captions" in refused_line(capsys, extract_text.main, "--data-path", images_folder, *line)
    names = [json.dumps({"image_path": f"pictures/{number}.png", "text": "a.jpg"}) for number in range(4)]
    listed = write_listed(tmp_path / "names", *names)
    sentence = refused_line(capsys, extract_text.main, "--data-path", listed, *line)
    assert "--caption-cleaning published leaves nothing of any of the 4 captions" in sentence
    extract(data, tmp_path / "text", options)
    others = refused_line(capsys, extract_text.main, "--data-path", data, *line, "--caption-key", "short")
    assert "holds caption features made with captions_checksum" in others
    wider = refused_line(capsys, extract_text.main, "--data-path", data, *line[:-2], "--text-width", 64)
    assert "made with" in wider and "choose another folder or delete this one." in wider


def refused_line(capsys, main, *arguments: object) -> str:
    """The one sentence of a command that is refused, without the lines of its log."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].endswith(".")
    return lines[0]


# --- the folder and the data set -------------------------------------------------------------------------------------


def header(**changed) -> TextHeader:
    """The header of features of 48 images with two captions each, as `write_codes` makes codes."""
    made = TextHeader("hashed", "", "f" * 16, 4, 5, "none", 2, "first-sentence", 48, "c", "", "48 images of x")
    return replace(made, **changed)


def write_text(folder: Path, **changed) -> Path:
    """Features whose numbers say image, crop and token; image 3 has no caption."""
    about = header(**changed)
    lengths = np.stack([1 + np.arange(about.images) % 5, np.ones(about.images, int)], axis=1)
    lengths[3] = 0
    folder.mkdir(parents=True, exist_ok=True)
    writer = TextWriter(folder, about, lengths, ALONE)
    for row in range(about.images):
        if row == 3:
            writer.skip(np.array([row]))
        else:
            tokens = [(row, crop, token, 1) for crop in range(2) for token in range(lengths[row, crop])]
            writer.write(np.array([row]), torch.tensor(tokens, dtype=torch.float32))
    writer.finish()
    return folder


def test_codes_and_captions_of_one_image_come_together(tmp_path):
    """Rows, crops and padding: a shift by one would train every image on its neighbour's caption."""
    codes = write_codes(tmp_path / "codes", crops=1)
    write_text(codes / "text")
    data = CaptionedCodes(codes, seed=1)
    rows, short, stored = np.delete(np.arange(48), 3), 0, torch.from_numpy(np.load(codes / "codes.npy")[:, 0].astype(np.int64))
    assert len(data) == 47 and "_features" not in data.__getstate__()
    data = pickle.loads(pickle.dumps(data))
    for epoch in range(20):
        found, (features, mask), valid = data.__getitems__([(epoch, index) for index in range(47)])
        assert torch.equal(found, stored[rows])
        assert features.shape == (47, 5, 4) and valid.all() and valid.shape == (47,) and not features[~mask].any()
        crops = features[:, -1, 1].long()
        assert torch.equal(features[:, -1, 0].long(), torch.from_numpy(rows))
        assert torch.equal(mask.sum(1), torch.where(crops == 1, 1, torch.from_numpy(1 + rows % 5)))
        for row in range(47):
            assert features[row, mask[row], 2].tolist() == list(range(int(mask[row].sum())))
        short += int(crops.sum())
        if epoch == 0:
            assert torch.equal(data.__getitems__([(0, 5)])[1][0], features[5:6])  # whatever else is in the batch
    assert 0.25 < short / (20 * 47) < 0.35
    loader = DataLoader(data, batch_sampler=[[(0, 0), (0, 1)]], collate_fn=tuple)  # as the trainer's
    assert next(iter(loader))[1][1].dtype == torch.bool


def test_short_captions_follow_their_share(tmp_path):
    """0 and 1 are never and always, for ablations."""
    text = write_text(tmp_path / "text")
    for share in (0.0, 1.0):
        data = CaptionedCodes(write_codes(tmp_path / "codes"), text_path=text, short_captions=share)
        assert (data.__getitems__([(0, index) for index in range(47)])[1][0][:, -1, 1] == share).all()


def test_captions_of_other_images_are_refused_by_name(tmp_path, t5):
    """Features and codes are joined by rows: another set of images of the same number would fit without a word."""
    codes = write_codes(tmp_path / "codes")
    with pytest.raises(UserError, match=r"--text-path .*other images \(40 images of y\) than --code-path .*codes \(random\)"):
        CaptionedCodes(codes, text_path=write_text(tmp_path / "fewer", images=40, source="40 images of y"))
    with pytest.raises(UserError, match=r"--code-path .*codes/text holds no caption features .*extract_text.py wrote"):
        CaptionedCodes(codes)
    data, (_, tokenizer) = write_npz(tmp_path / "data"), export_models(tmp_path / "models")
    call(extract_codes_c2i.main, *extract_options(data, tokenizer, tmp_path / "own"))
    text = extract(data, tmp_path / "text", options_of("hashed", t5))
    assert len(CaptionedCodes(tmp_path / "own", text_path=text)) == 4
    brighter = tmp_path / "brighter.npz"
    np.savez(brighter, images=np.load(data)["images"] // 2, captions=np.array(WORDS))
    call(extract_codes_c2i.main, *extract_options(brighter, tokenizer, tmp_path / "others"))
    with pytest.raises(UserError, match="has features of captions of other images"):
        CaptionedCodes(tmp_path / "others", text_path=text)


def test_features_of_another_width_or_encoder_are_refused(tmp_path):
    """A projection of another width fails with a shape; another encoder of the same width would fail in silence."""
    found = read_text_header(tmp_path, write_text(tmp_path / "text"))
    assert found == read_text_header(tmp_path) and found.record == EncoderRecord("hashed", "", "f" * 16, 4, 5, "none")
    for field, value in (("text_width", 2048), ("encoder_fingerprint", "0" * 16)):
        with pytest.raises(UserError, match=f"--text-path x has {field} .* but --gpt-ckpt y says {value}: use caption features"):
            require_fit(found, "x", {field: (value, "--gpt-ckpt y")}, "--text-path")


@pytest.mark.parametrize("name, damage, sentence", [
    ("header.json", lambda text: text.replace(b'"text_width": 4', b'"text_width": "4"'), "not a positive integer"),
    ("header.json", lambda text: text.replace(b'"complete": true', b'"complete": false'), "is an unfinished extraction"),
    ("header.json", lambda text: text.replace(b'"text_width": 4', b'"text_width": 8'), "features.npy holds <u2"),
    ("features.npy", lambda whole: whole[:-100], "features.npy is truncated or no npy file"),
    ("lengths.npy", lambda whole: whole[:-8] + b"\7" + bytes(7), "gives image 47 a caption of 7 tokens, not of 1 to 5"),
    ("state.npy", lambda whole: whole[:-1] + b"\0", "says that 1 of 48 images have no caption features"),
    ("state.npy", lambda whole: whole[:-48] + b"\1" * 48, "gives image 3 a caption of 0 tokens"),
])
def test_damaged_folders_are_refused(tmp_path, name, damage, sentence):
    """None of the files is trusted: a wrong length would read the neighbours' tokens."""
    path = write_text(tmp_path / "text") / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"--text-path .*{sentence}.*"):
        open_text(tmp_path / "text")


# --- CLIP score ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP with random weights, its tokenizer and its image preparation."""
    transformers = pytest.importorskip("transformers")
    folder, shape = tmp_path_factory.mktemp("clip"), dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                                          num_attention_heads=2)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=dict(vocab_size=16, max_position_embeddings=6, eos_token_id=1, pad_token_id=0,
                                                      bos_token_id=2) | shape,
                                     vision_config=dict(image_size=16, patch_size=8) | shape, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    write_tokenizer(folder, "</s>")
    return folder


def score(samples: Path, clip: Path, out: Path, *more: object) -> dict:
    """The result of the command."""
    call(clip_score.main, samples, "--clip", clip, "--json", out, "--device", "cpu", *more)
    return json.loads(out.read_text())


def test_the_clip_score_is_a_mean_of_cosines(clip, tmp_path, capsys):
    """Pairs, not batches: another batch size, or the same pairs in GenEval's folders, give the same number."""
    from transformers import AutoTokenizer, CLIPModel

    images = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    captions = [*WORDS, "a cat"]
    np.savez(tmp_path / "x.npz", arr_0=images, captions=np.array(captions))
    found = score(tmp_path / "x.npz", clip, tmp_path / "a.json", "--batch-size", 2)
    assert found["pairs"] == 5 and 0 <= found["clip_score"] <= 100 and "CLIP score" in capsys.readouterr().out
    expected, scorer = [], clip_score.Clip(str(clip), CPU)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    for image, caption in zip(images, captions, strict=True):
        pixels = scorer._prepare(images=[image], return_tensors="pt")["pixel_values"]
        output = model(pixel_values=pixels, **{key: value for key, value in tokenizer(caption, return_tensors="pt").items()
                                               if key != "token_type_ids"})
        expected.append(max(100 * float((output.image_embeds * output.text_embeds).sum().detach()), 0))
    assert found["clip_score"] == pytest.approx(np.mean(expected), abs=1e-2) and max(expected) > 0
    write_geneval(tmp_path / "folder", images, captions)
    assert score(tmp_path / "folder", clip, tmp_path / "b.json")["clip_score"] == pytest.approx(found["clip_score"], abs=1e-3)


def write_geneval(folder: Path, images: np.ndarray, captions: list[str]) -> None:
    """The layout that GenEval's evaluator reads, one image for each prompt."""
    from PIL import Image

    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps({"prompt": caption, "tag": "x"}))
        Image.fromarray(image).save(folder / f"{number:05d}" / "samples" / "0000.png")


def test_clip_scores_of_what_is_no_pair_are_refused(clip, tmp_path, capsys):
    """One sentence, before CLIP is loaded."""
    np.savez(tmp_path / "bare.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "fewer.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), captions=np.array(["a"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "0" / "samples").mkdir(parents=True)
    (tmp_path / "bad" / "0" / "metadata.jsonl").write_text("{}")
    (tmp_path / "bad" / "0" / "samples" / "0.png").write_bytes(png(SHADES[0]))
    for name, sentence in (("bare.npz", "has no captions, only arr_0"), ("fewer.npz", "not 2 strings"),
                           ("nowhere", "does not exist"), ("empty", "holds no NUMBER/metadata.jsonl"),
                           ("bad", "line 1, has no 'prompt'")):
        assert sentence in refused(capsys, clip_score.main, tmp_path / name, "--clip", clip)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8), captions=np.array(["a"]))
    assert "--clip /nowhere cannot be loaded" in refused_line(capsys, clip_score.main, tmp_path / "x.npz", "--clip", "/nowhere")


def test_a_caption_encoder_reports_nothing_that_fits(t5, caplog):
    """A warning that is always there is read by nobody."""
    encoder: CaptionEncoder = make_encoder(options_of("t5", t5), CPU, False)
    encoder(["a cat"])
    assert not caplog.records
