"""The recipes' tokenizer: byte-level BPE with the marks of parallel generation and one-token headings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_hybrid.core.grammars.native import NativeGrammar
from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.models.vocabulary import LENGTHS, MAX_DEPENDS
from hf_hybrid.training.examples import Example, Part
from hf_hybrid.training.recipes.sheets import Sheet

TokenCounter = Callable[[str], int]

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<mask>", "<|user|>", "<|assistant|>"),
    *NativeGrammar.texts(LENGTHS, MAX_DEPENDS),
)

# A line's "- **" and ":**" are units; digits form groups of at most three, with the space before them.
_WORDS = r"- \*\*|:\*\*| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + ns.system + message['content'] -}}{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + '<eos>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(
    texts: Iterable[str],
    headings: Sequence[str],
    vocab_size: int = 2048,
    *,
    fewer: bool = False,
    model_max_length: int = 1024,
) -> PreTrainedTokenizerFast:
    """Train on `texts`: exactly `vocab_size` tokens, among them each of the `headings`.

    Args:
        fewer: True: texts that give fewer tokens are no error.
        model_max_length: positions of the model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(headings),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_without(text, headings) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(heading, special=False, normalized=False) for heading in headings])
    if tokenizer.get_vocab_size() != vocab_size and not fewer:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"the texts gave {size} tokens, not {vocab_size}: give more texts or another vocab_size")
    user, assistant = "<|user|>", "<|assistant|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{user} $A {assistant}",
        pair=f"{user} $A $B {assistant}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (user, assistant)],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _without(text: str, headings: Sequence[str]) -> str:
    for heading in headings:
        text = text.replace(heading, "\n")
    return text


def token_counter(tokenizer: PreTrainedTokenizerFast) -> TokenCounter:
    """Counts a text's tokens without the marks around a prompt."""
    backend = tokenizer.backend_tokenizer

    def count(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False).ids)

    return count


class SheetEncoder:
    """Encodes sheets: the prompt with its marks, each text, and each part's heading and lines.

    A tag that occurs in a text, such as a written-out ``<eos>``, is ordinary text. A label of more tokens than a plan
    may name (``PlanLimits.max_label_length``) ends there, and its rest begins the part's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.encode_special_tokens = True
        user, assistant = (tokenizer.backend_tokenizer.token_to_id(mark) for mark in ("<|user|>", "<|assistant|>"))
        if user is None or assistant is None:
            raise ValueError(
                "the tokenizer has no <|user|> and <|assistant|>, which mark a prompt; take that of a "
                "checkpoint that a recipe has trained"
            )
        self.user, self.assistant = int(user), int(assistant)
        self.longest_label = PlanLimits().max_label_length

    def __call__(self, sheet: Sheet) -> Example:
        """The example of a sheet."""
        texts = [sheet.prompt]
        for piece in sheet.pieces:
            texts += [piece] if isinstance(piece, str) else [text for part in piece for text in (part.label, part.text)]
        encoded = iter([tuple(e.ids) for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)])
        prompt = (self.user, *next(encoded), self.assistant)
        pieces: list[tuple[int, ...] | tuple[Part, ...]] = []
        for piece in sheet.pieces:
            if isinstance(piece, str):
                pieces.append(next(encoded))
            else:
                pieces.append(tuple(self._part(next(encoded), next(encoded), part.depends) for part in piece))
        return Example(prompt=prompt, pieces=tuple(pieces))

    def _part(self, label: tuple[int, ...], text: tuple[int, ...], depends: tuple[int, ...]) -> Part:
        cut = self.longest_label
        return Part(label=label[:cut], text=label[cut:] + text, depends=depends)
