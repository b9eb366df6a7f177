"""Every code block of README and of the documentation is executed, or says on the page why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import doc_blocks
from support.doc_blocks import ROOT, Blocks

DOCS = ROOT / "docs"
# CONTRIBUTING.md's blocks are carried out by tests/test_worked_examples.py.
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), *(DOCS / "api").glob("*.md")])
# How many blocks of a page say that they are not run. Each names its reason on the page.
NOT_RUN = {"docs/deepspeed.md": 1, "docs/deployment.md": 1, "docs/paging.md": 1, "docs/torchao.md": 1}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript and torch.ao, which deployment.md still shows
@pytest.mark.filterwarnings("ignore:No seed found")  # a configuration need not name one
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_executed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = Blocks()
    blocks.run(page)
    languages = doc_blocks.fences(page)
    assert len(blocks.ran) + len(blocks.not_run) == len(languages), f"blocks in {languages}; executed: {blocks.ran}"
    assert len(blocks.not_run) == NOT_RUN.get(named(page), 0), blocks.not_run


def test_no_page_is_named_in_vain() -> None:
    assert set(NOT_RUN) <= set(map(named, PAGES))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```python\nprint(1 / 3)\n```\n\n```text\n0.41\n```\n", "the page says"),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "AssertionError"),
        ("```text\nx\n```\n", "no python block"),
        ("```bash\nlowbit plam\n```\n", "there are"),
        ("```bash\nlowbit plan net:make --worldsize 8\n```\n", "no option"),
        ("```bash\nmake coffee\n```\n", "no such target"),
        ("```bash\npip install 'lowbit-lightning[cuda11]'\n```\n", "no such extra"),
        ("```bash\npython examples/train_gtp.py\n```\n", "does not exist"),
        ("```bash\nfrobnicate\n```\n", "nothing checks"),
        ("```python\n# not run by the tests: it does not compile\nx = (\n```\n", "SyntaxError"),
    ],
)
def test_a_wrong_block_is_found(text: str, fault: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((Exception, SystemExit)) as raised:
        Blocks().run(page)
    assert fault in f"{raised.type.__name__}: {raised.value}"


def test_a_block_in_an_unknown_language_is_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nx\n```\n\n  ```ruby\n  y\n  ```\n")
    blocks = Blocks()
    blocks.run(page)
    assert doc_blocks.fences(page) == ["", "ruby"]
    assert blocks.ran == []
