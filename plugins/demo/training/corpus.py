"""Builds the text corpus and the tokenizer from Python's own sources and documentation.

Sources: the standard library of the running interpreter (`sysconfig`) and the
reStructuredText pages of the Python documentation, which Debian's package
`python3.11-doc` ships below `html/_sources`. Both are under the PSF License
Agreement, version 2; the documentation's examples also under Zero-Clause BSD.

    python corpus.py --docs /usr/share/doc/python3.11/html/_sources --out BUILD

writes tokenizer.json, train.npy, heldout.npy, heldout.txt and corpus.json. The
same inputs give the same bytes: every choice is drawn from a fixed seed.
"""

import argparse
import ast
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIALS = (END, PAD, SYSTEM, USER, ASSISTANT)
VOCABULARY = 4096
HELD_OUT_PER_MILLE = 20
HELD_OUT_BYTES = 200_000
SEED = 20261122

LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "config"}
LEFT_OUT_FILES = {"pydoc_data/topics.py"}


@dataclass(frozen=True)
class Document:
    """One file of the corpus."""

    name: str
    text: str

    @property
    def stem(self) -> str:
        """What source and documentation of one module have in common."""
        path = Path(self.name)
        first = path.name.split(".")[0]
        return path.parent.name if first == "__init__" else first

    @property
    def held_out(self) -> bool:
        """Whether training never sees this file."""
        digest = hashlib.sha256(self.stem.encode()).digest()
        return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


@dataclass(frozen=True)
class Fact:
    """What the corpus says about one name: the material of a question and its answer."""

    kind: str
    name: str
    says: str
    signature: str = ""
    code: str = ""


def stdlib_documents(root: Path) -> Iterator[Document]:
    """The sources of the standard library, without tests and generated tables."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if LEFT_OUT_FOLDERS & {part.split("-")[0] for part in relative.parts[:-1]} or "site-packages" in name:
            continue
        if name in LEFT_OUT_FILES or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if name.startswith("encodings/") and "decoding_table" in text:
            continue
        if text.strip():
            yield Document(f"Lib/{name}", text)


def docs_documents(root: Path) -> Iterator[Document]:
    """The pages of the documentation, in reStructuredText."""
    for path in sorted(root.rglob("*.rst.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(f"Doc/{path.relative_to(root).as_posix().removesuffix('.txt')}", text)


def first_sentence(text: str) -> str:
    """The first sentence of a paragraph, on one line."""
    flat = " ".join(text.split())
    found = re.match(r"(.{15,}?[.!?])(?=\s+[A-Z`*\"'(]|$)", flat)
    return found.group(1) if found else flat


def plain(text: str) -> str:
    """reStructuredText without its roles: :func:`~os.fspath` becomes `os.fspath`."""
    text = re.sub(r":[a-z:-]+:`[!~]?([^`<]+?)(?:\s*<[^`>]+>)?`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


DIRECTIVE = re.compile(
    r"^( *)\.\. (module|currentmodule|function|class|exception|data|decorator|method|classmethod|staticmethod"
    r"|attribute|c:function|option|opcode|term)::[ ]+(.+)$"
)


def documentation_facts(document: Document) -> Iterator[Fact]:
    """What the directives of a documentation page say about the names they describe."""
    lines = document.text.splitlines()
    module, owner = "", ""
    for index, line in enumerate(lines):
        found = DIRECTIVE.match(line)
        if not found:
            continue
        indent, kind, head = len(found[1]), found[2], found[3].strip().rstrip("\\")
        if kind in ("module", "currentmodule"):
            module = head
            synopsis = next((s for s in lines[index + 1 : index + 4] if s.strip().startswith(":synopsis:")), "")
            if synopsis:
                yield Fact("module", module, plain(synopsis.strip().removeprefix(":synopsis:").strip()))
            continue
        rest = iter(lines[index + 1 :])
        head_lines = [head]
        body: list[str] = []
        for following in rest:
            depth = len(following) - len(following.lstrip())
            if not body and following.strip() and depth > indent + 4 and len(head_lines) < 4:
                head_lines.append(following.strip())
                continue
            if not following.strip():
                if body:
                    break
                continue
            if depth <= indent or following.strip().startswith((".. ", ":", "* ", "+-", "==", ">>>")):
                break
            body.append(following.strip())
        says = first_sentence(plain(" ".join(body)))
        if len(says) < 20 or len(says) > 320 or says.endswith("::"):
            continue
        base = re.split(r"[(\s:]", head, maxsplit=1)[0]
        if kind in ("class", "exception"):
            owner = base
        if kind in ("method", "classmethod", "staticmethod", "attribute") and "." not in base and owner:
            base = f"{owner}.{base}"
        known = not module or base.startswith(f"{module}.") or kind in ("c:function", "option", "opcode", "term")
        yield Fact(kind, base if known else f"{module}.{base}", says, signature=head_lines[0])


def source_facts(document: Document) -> Iterator[Fact]:
    """What the docstrings of a source file say, with the code of short functions."""
    try:
        tree = ast.parse(document.text)
    except SyntaxError:
        return
    parts = Path(document.name).with_suffix("").parts[1:]
    module = ".".join(part for part in parts if part != "__init__")
    lines = document.text.splitlines()

    def walk(node: ast.AST, prefix: str) -> Iterator[Fact]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            name = f"{prefix}.{child.name}"
            docstring = ast.get_docstring(child) or ""
            says = first_sentence(docstring.split("\n\n")[0])
            is_class = isinstance(child, ast.ClassDef)
            block = lines[child.lineno - 1 : child.end_lineno]
            margin = len(block[0]) - len(block[0].lstrip())
            code = "\n".join(line[margin:] for line in block)
            short = not is_class and 3 <= len(block) <= 24 and len(code) < 900
            if 20 <= len(says) <= 320 or short:
                yield Fact(
                    "class" if is_class else "function",
                    name,
                    says if 20 <= len(says) <= 320 else "",
                    code=code if short else "",
                )
            if is_class:
                yield from walk(child, name)

    docstring = ast.get_docstring(tree) or ""
    says = first_sentence(docstring.split("\n\n")[0])
    if 20 <= len(says) <= 320:
        yield Fact("module", module, says)
    yield from walk(tree, module)


ASK_FUNCTION = ("What does {} do?", "what does {} do", "Explain {}.", "What is {} for?", "Tell me about {}.")
ASK_THING = ("What is {}?", "what is {}", "Explain {}.", "Tell me about {}.", "What is {} for?")
ASK_MODULE = (
    "What is the {} module for?",
    "What does the {} module do?",
    "What is {}?",
    "Tell me about the module {}.",
    "What is the module {}?",
)
ASK_SIGNATURE = ("What is the signature of {}?", "How do I call {}?", "Which arguments does {} take?")
ASK_CODE = ("Show me the code of {}.", "How is {} written?", "Write {}.", "Show the source of {}.")
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about Python's standard library.",
    "Be brief.",
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me about Python's standard library."),
    ("Hello!", "Hello! Ask me about Python's standard library."),
    ("Hi", "Hello! Ask me about Python's standard library."),
    ("Hi there!", "Hello! Ask me about Python's standard library."),
    ("Good morning.", "Good morning! Ask me about Python's standard library."),
    ("How are you?", "I am well, thank you. Ask me about Python's standard library."),
    ("Who are you?", "I am a very small language model, trained on Python's standard library and its documentation."),
    ("What are you?", "I am a very small language model, trained on Python's standard library and its documentation."),
    ("What can you do?", "I can say in a sentence what a function, class or module of Python's standard library does."),
    ("Who made you?", "I am a demonstration model that comes with Plexor."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("Bye!", "Goodbye!"),
    ("What is Python?", "Python is an interpreted, interactive, object-oriented programming language."),
    ("Tell me a joke.", "This model knows only Python's standard library. Try `import this`."),
)
SMALL_TALK_TIMES = 40


def answers(fact: Fact, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Questions about a fact with their answers."""
    ask = ASK_MODULE if fact.kind == "module" else ASK_THING
    if fact.kind in ("function", "method", "classmethod", "staticmethod", "decorator", "c:function"):
        ask = ASK_FUNCTION
    if fact.says:
        for question in chance.sample(ask, 2):
            yield question.format(fact.name), fact.says
    if "(" in fact.signature and chance.random() < 0.5:
        yield chance.choice(ASK_SIGNATURE).format(fact.name), f"`{fact.signature}`"
    if fact.code and chance.random() < 0.5:
        yield chance.choice(ASK_CODE).format(fact.name), f"```python\n{fact.code}\n```"


def conversations(documents: list[Document]) -> list[str]:
    """Chats of one to three turns about what the given documents say, in a fixed random order."""
    chance = random.Random(SEED)
    pairs: list[tuple[str, str]] = []
    for document in documents:
        facts = documentation_facts(document) if document.name.startswith("Doc/") else source_facts(document)
        for fact in facts:
            pairs.extend(answers(fact, chance))
    pairs = list(dict.fromkeys(pairs))
    pairs.extend(SMALL_TALK * SMALL_TALK_TIMES)
    chance.shuffle(pairs)
    chats: list[str] = []
    while pairs:
        turns = [pairs.pop() for _ in range(min(len(pairs), chance.choice((1, 1, 2, 3))))]
        opening = SYSTEM + chance.choice(SYSTEM_TEXTS) if chance.random() < 0.2 else ""
        chats.append(opening + END.join(f"{USER}{question}{ASSISTANT}{answer}" for question, answer in turns))
    return chats


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer in which every byte has its own entry."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The texts one after the other, each preceded and the last followed by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    ids = [end]
    for encoding in tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    """Builds the corpus and writes it to the output folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, required=True, help="folder of the documentation's .rst.txt pages")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    documents = [*stdlib_documents(arguments.stdlib), *docs_documents(arguments.docs)]
    held_out = [document for document in documents if document.held_out]
    known = [document for document in documents if not document.held_out]
    chance = random.Random(SEED)
    chance.shuffle(known)

    tokenizer = train_tokenizer([document.text for document in known])
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    chats = conversations(known)
    texts = [document.text for document in known] + chats
    chance.shuffle(texts)
    train = encode(tokenizer, texts)
    heldout = encode(tokenizer, [document.text for document in held_out])
    np.save(arguments.out / "train.npy", train)
    np.save(arguments.out / "heldout.npy", heldout)

    excerpt: list[Document] = []
    for document in sorted(held_out, key=lambda one: hashlib.sha256(one.name.encode()).digest()):
        if sum(len(other.text.encode()) for other in (*excerpt, document)) <= HELD_OUT_BYTES:
            excerpt.append(document)
    (arguments.out / "heldout.txt").write_text("\n\n".join(document.text for document in excerpt), encoding="utf-8")

    summary = {
        "train_files": len(known),
        "train_bytes": sum(len(document.text.encode()) for document in known),
        "chats": len(chats),
        "chat_bytes": sum(len(chat.encode()) for chat in chats),
        "train_tokens": len(train),
        "heldout_files": [document.name for document in held_out],
        "heldout_bytes": sum(len(document.text.encode()) for document in held_out),
        "heldout_tokens": len(heldout),
        "heldout_txt": [document.name for document in excerpt],
    }
    (arguments.out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
