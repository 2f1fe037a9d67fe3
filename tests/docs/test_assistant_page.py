"""The page on customer service: its grpcurl bodies are accepted, its Python runs, its settings have the defaults it gives."""

import asyncio
import re
import sys
from pathlib import Path

from google.protobuf import json_format

from server.settings import ServerSettings
from tests.docs.test_readme import _GRPCURL, _request, blocks
from tests.edge import serving
from tests.fakes import Fakes

PAGE = (Path(__file__).parents[2] / "docs" / "assistant.md").read_text()


async def test_the_grpcurl_examples_are_accepted() -> None:
    examples = _GRPCURL.findall(PAGE)
    assert {f"{service}/{method}" for _, service, method in examples} == {
        "ArticleService/UpsertArticles",
        "ArticleService/ListArticles",
        "ArticleService/DeleteArticles",
        "AssistantService/Ask",
    }
    async with serving(Fakes()) as edge:
        for body, service, method in examples:
            request = json_format.Parse(body, _request(service, method)())
            await edge.raw(f"/concord.v1.{service}/{method}", request.SerializeToString(), timeout=10)


async def test_the_python_examples_run(tmp_path: Path) -> None:
    examples = blocks(PAGE, "python")
    assert len(examples) == 2
    async with serving(Fakes()) as edge:
        for number, example in enumerate(examples):
            imports, _, body = example.partition("\n\n")
            indented = "\n".join(f"    {line}" for line in body.replace("127.0.0.1:50051", f"127.0.0.1:{edge.server.port}").splitlines())
            program = tmp_path / f"example{number}.py"
            program.write_text(f"import asyncio\n{imports}\n\nasync def main():\n{indented}\n\nasyncio.run(main())\n")
            process = await asyncio.create_subprocess_exec(sys.executable, "-W", "error", str(program), stderr=asyncio.subprocess.PIPE)
            _, err = await process.communicate()
            assert (process.returncode, err.decode()) == (0, "")
        assert len(edge.fakes.assistant.calls) == 2


def test_the_settings_have_the_defaults_it_gives() -> None:
    fields = ServerSettings.model_fields
    assert "| `CONCORD_ASSISTANT_MIN_CONFIDENCE` | 0.5 |" in PAGE
    assert fields["assistant_min_confidence"].default == 0.5
    assert fields["assistant_scope_confidence"].default == 0.1
    assert (fields["assistant_remembered"].default, fields["assistant_remembered_seconds"].default) == (6, 86_400)
    assert re.search(r"`CONCORD_GENERATOR_TIMEOUT_SECONDS` \(1\.5\)", PAGE)
    assert fields["generator_timeout_seconds"].default == 1.5
