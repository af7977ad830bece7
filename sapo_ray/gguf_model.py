"""A GGUF file, the format of llama.cpp, as a transformers model with its tokenizer: weights unpacked, nothing lost.

transformers reads the file; what it would leave out without a word (rotary scaling, say) is refused here, and what it
does not take over (how digits are cut, what ends a turn) is set here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo_ray.errors import SapoError, told

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Pre-tokenizers that are GPT-2's after every digit has been set apart (llama.cpp, src/llama-vocab.cpp)."""
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "tekken"}
"""Those whose words are looked up before merges are tried, and whose texts begin with a token of their own."""
_SAME_WEIGHTS = 0.1
"""Two quantizations of one matrix lie closer than this, relative to its norm; two matrices lie 1 apart and more."""


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model of a GGUF file, and its tokenizer, whose end of sequence is the end of a turn.

    By default the weights have the type they have in the file; bfloat16, in which most models are published, where they
    are quantized. Raises SapoError where the file holds no such model, not all of it, or more than transformers takes.
    """
    reader = _read(path)
    _check(path, reader)
    try:
        # A folder of its own: a tokenizer that lies beside the file would win over the one inside.
        with tempfile.TemporaryDirectory(prefix="sapo-") as folder:
            Path(folder, "model.gguf").symlink_to(path.absolute())
            tokenizer = _load_tokenizer(reader, folder)
            model = _load_model(path, reader, folder, dtype or _stored_dtype(reader))
        _tie(model, reader)
        _end_turns(model, tokenizer)
    except SapoError:
        raise
    except Exception as error:  # of the libraries, over whatever the file holds
        raise SapoError(f"{path} cannot be loaded by transformers: {told(error)}; import another model") from error
    return model, tokenizer


def _read(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise SapoError(f"{path} is no GGUF file: it does not begin with GGUF")
        return GGUFReader(path)
    except (SapoError, OSError):
        raise
    except Exception as error:  # whatever the reader stumbles over in a damaged file
        raise SapoError(f"{path} is damaged or cut short ({told(error)}); fetch it again") from error


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _check(path: Path, reader: GGUFReader) -> None:
    """Refuse what transformers would fail at obscurely, or take for something else."""
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    parts = _value(reader, "split.count", 1)
    if parts > 1:
        raise SapoError(
            f"{path} is part {_value(reader, 'split.no', 0) + 1} of {parts}; join them with llama-gguf-split --merge"
        )
    architecture = _value(reader, "general.architecture")
    known = {name.replace("_", "") for name in (*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS)}
    if str(architecture).replace("_", "").replace("-", "") not in known:
        raise SapoError(
            f"{path} holds a model of architecture {architecture}, which transformers cannot read from a GGUF file; "
            "import its checkpoint from the hub instead"
        )
    if reader.get_field("tokenizer.ggml.tokens") is None or _value(reader, "tokenizer.ggml.eos_token_id") is None:
        raise SapoError(
            f"{path} has no tokenizer, or none with an end-of-sequence token (tokenizer.ggml.…); it is made by "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    cut = _value(reader, "tokenizer.ggml.pre")
    if _value(reader, "tokenizer.ggml.model") == "gpt2" and cut not in {
        "gpt-2",
        *_SINGLE_DIGITS,
        *GGUF_PRE_TOKENIZER_SPLITS,
    }:
        raise SapoError(
            f"{path}: tokenizer.ggml.pre is {cut}; how it cuts texts into words is not known here, and another cut "
            "gives other tokens; import the model's checkpoint from the hub instead"
        )


def _load_tokenizer(reader: GGUFReader, folder: str) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    cut, kind = _value(reader, "tokenizer.ggml.pre"), _value(reader, "tokenizer.ggml.model")
    backend = tokenizer.backend_tokenizer
    if cut in _SINGLE_DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if cut in _WHOLE_WORDS:
        backend.model.ignore_merges = True
    begins = _value(reader, "tokenizer.ggml.add_bos_token", kind == "llama" or cut in _WHOLE_WORDS)
    tokenizer.add_bos_token = bool(begins and tokenizer.bos_token)
    tokenizer.model_max_length = _value(reader, f"{_value(reader, 'general.architecture')}.context_length")
    return tokenizer


def _load_model(path: Path, reader: GGUFReader, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with every weight of the file in it. Raises SapoError where one is missing or left over."""
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),  # packed weights can be neither trained nor saved
        dtype=dtype,
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    missing = [*loaded[1]["missing_keys"], *loaded[1]["mismatched_keys"]]
    if missing:
        raise SapoError(f"{path} lacks weights of a {type(model).__name__}, such as {missing[0]}; fetch a whole model")
    stored, taken = sum(int(tensor.n_elements) for tensor in reader.tensors), model.num_parameters()
    if stored != taken:
        raise SapoError(
            f"{path} holds {stored:,} weights, of which a {type(model).__name__} takes {taken:,}: transformers would "
            "leave out the rest, such as rope_freqs.weight, the scaling of positions; import the model's checkpoint "
            "from the hub instead"
        )
    model.config.__dict__.pop("_model_name_or_path", None)  # the file's title, no name that anything can be loaded by
    return model


def _stored_dtype(reader: GGUFReader) -> torch.dtype:
    import torch

    # Norms and biases are F32 in every file.
    match {tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}:
        case kinds if not kinds:
            return torch.float32
        case kinds if kinds == {"F16"}:
            return torch.float16
        case _:
            return torch.bfloat16


def _tie(model: PreTrainedModel, reader: GGUFReader) -> None:
    """Share the embeddings again where the file holds one matrix twice, quantized in two ways: the finer one stays."""
    import torch

    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is embedding:
        return
    norm = torch.linalg.vector_norm
    if norm(head.float() - embedding.float()) > _SAME_WEIGHTS * norm(head.float()):
        return
    size = {tensor.name: tensor.n_bytes for tensor in reader.tensors}
    if size["output.weight"] > size["token_embd.weight"]:
        embedding.data = head.data
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _end_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the end of a turn the end of a sequence, and have generation end there as well as where the file says."""
    ends = [tokenizer.eos_token_id]
    turn = end_of_turn(tokenizer)
    if turn is not None and turn not in ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(turn)
        ends.insert(0, turn)
    for config in (model.config, model.generation_config):
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an answer, or None where there is no such token."""
    if tokenizer.chat_template is None:
        return None
    answer = "sapo"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(answer)[2]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in tokenizer.encode(after, add_special_tokens=False) if token in special), None)
