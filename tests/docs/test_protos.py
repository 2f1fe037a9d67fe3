"""The contract is its own reference: every element is commented, and the conventions of STYLE.md hold."""

from collections.abc import Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
# Field numbers inside descriptor.proto, of which a SourceCodeInfo path is made.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE, FILE_SYNTAX = 4, 5, 6, 12
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE, SERVICE_METHOD = 2, 2
INTEGER_TIME_SUFFIXES = ("_seconds", "_ms", "_micros", "_at", "_time")

Path_ = tuple[int, ...]


def compile_protos(root: Path, out: Path) -> list[FileDescriptorProto]:
    """Compiles every proto below ``root`` with its comments; a warning of the compiler is an error."""
    files = sorted(str(path) for path in root.rglob("*.proto"))
    include = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{root}", f"-I{include}", f"--descriptor_set_out={out}", "--include_source_info", "--fatal_warnings", *files]
    assert protoc.main(arguments) == 0
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    return compile_protos(PROTOS, tmp_path_factory.mktemp("protos") / "set.pb")


def elements(file: FileDescriptorProto) -> Iterator[tuple[str, Path_]]:
    """Yields the name and source path of everything that must be commented."""
    for i, service in enumerate(file.service):
        yield service.name, (FILE_SERVICE, i)
        for j, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (FILE_SERVICE, i, SERVICE_METHOD, j)
    for i, message in enumerate(file.message_type):
        yield from message_elements(message, message.name, (FILE_MESSAGE, i))
    for i, enum in enumerate(file.enum_type):
        yield from enum_elements(enum, enum.name, (FILE_ENUM, i))


def message_elements(message: DescriptorProto, name: str, path: Path_) -> Iterator[tuple[str, Path_]]:
    yield name, path
    for i, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, MESSAGE_FIELD, i)
    synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
    for i, oneof in enumerate(message.oneof_decl):
        if i not in synthetic:
            yield f"{name}.{oneof.name}", (*path, MESSAGE_ONEOF, i)
    for i, enum in enumerate(message.enum_type):
        yield from enum_elements(enum, f"{name}.{enum.name}", (*path, MESSAGE_ENUM, i))
    for i, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from message_elements(nested, f"{name}.{nested.name}", (*path, MESSAGE_NESTED, i))


def enum_elements(enum: EnumDescriptorProto, name: str, path: Path_) -> Iterator[tuple[str, Path_]]:
    yield name, path
    for i, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, ENUM_VALUE, i)


def uncommented(file: FileDescriptorProto) -> list[str]:
    commented = {tuple(place.path) for place in file.source_code_info.location if place.leading_comments.strip()}
    return [f"{file.name}: {name}" for name, path in elements(file) if path not in commented]


def all_messages(messages: list[DescriptorProto]) -> Iterator[DescriptorProto]:
    for message in messages:
        yield message
        yield from all_messages([nested for nested in message.nested_type if not nested.options.map_entry])


def all_fields(file: FileDescriptorProto) -> Iterator[tuple[str, FieldDescriptorProto]]:
    for message in all_messages(list(file.message_type)):
        for field in message.field:
            yield f"{message.name}.{field.name}", field


def snake(name: str) -> str:
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()


def test_every_service_of_the_contract_is_there(files):
    methods = {f"{service.name}.{method.name}" for file in files for service in file.service for method in service.method}
    assert methods == {
        "EventService.RecordEvents",
        "EventService.StreamEvents",
        "IdentityService.ResolveIdentity",
        "IdentityService.LinkIdentities",
        "IdentityService.UnlinkIdentity",
        "IdentityService.ForgetUser",
        "IdentityService.GetIdentityGraph",
        "ProfileService.GetProfile",
        "CatalogService.UpsertItems",
        "CatalogService.GetItems",
        "CatalogService.ListItems",
        "FeatureService.GetOnlineFeatures",
        "RecommendationService.Recommend",
        "RecommendationService.RankItems",
        "RecommendationService.SimilarItems",
        "SearchService.Search",
        "SearchService.Suggest",
        "UnderstandingService.EmbedText",
        "AssistantService.Ask",
        "ArticleService.UpsertArticles",
        "ArticleService.ListArticles",
        "ArticleService.DeleteArticles",
        "UnderstandingService.DetectIntent",
        "UnderstandingService.AnalyzeSentiment",
        "ModelService.ListModels",
        "ModelService.GetActiveModel",
        "ModelService.ActivateModel",
        "ModelService.ListReplicas",
    }


def test_every_element_is_commented(files):
    assert [name for file in files for name in uncommented(file)] == []


def test_every_file_says_what_it_is(files):
    bare = [
        file.name
        for file in files
        if not any(tuple(place.path) == (FILE_SYNTAX,) and place.leading_comments.strip() for place in file.source_code_info.location)
    ]
    assert bare == []


def test_package_is_the_directory(files):
    assert {(str(Path(file.name).parent).replace("/", "."), file.package) for file in files} == {("concord.v1", "concord.v1")}


def test_enum_values_carry_the_name_of_their_enum_and_zero_means_unspecified(files):
    enums = [
        enum
        for file in files
        for enum in [*file.enum_type, *(nested for message in all_messages(list(file.message_type)) for nested in message.enum_type)]
    ]
    assert enums
    for enum in enums:
        assert (enum.value[0].number, enum.value[0].name) == (0, f"{snake(enum.name)}_UNSPECIFIED")
        assert [value.name for value in enum.value if not value.name.startswith(f"{snake(enum.name)}_")] == []


def test_every_method_has_a_request_and_response_of_its_own(files):
    for file in files:
        for service in file.service:
            for method in service.method:
                expected = (f".{file.package}.{method.name}Request", f".{file.package}.{method.name}Response")
                assert (method.input_type, method.output_type) == expected


def test_numbers_are_signed_and_times_are_no_numbers(files):
    unsigned = {FieldDescriptorProto.TYPE_UINT32, FieldDescriptorProto.TYPE_UINT64}
    unsigned |= {FieldDescriptorProto.TYPE_FIXED32, FieldDescriptorProto.TYPE_FIXED64}
    fields = [named for file in files for named in all_fields(file)]
    assert [name for name, field in fields if field.type in unsigned] == []
    assert [
        name for name, field in fields if field.name.endswith(INTEGER_TIME_SUFFIXES) and field.type != FieldDescriptorProto.TYPE_MESSAGE
    ] == []


def test_messages_follow_the_order_of_the_methods(files):
    for file in files:
        names = [message.name for message in file.message_type]
        own = [
            name.rsplit(".", 1)[-1]
            for service in file.service
            for method in service.method
            for name in (method.input_type, method.output_type)
        ]
        assert names[: len(own)] == own


def test_the_check_itself_sees_missing_comments(tmp_path):
    (tmp_path / "bare.proto").write_text(
        'syntax = "proto3";\n'
        "// Said.\nmessage Said {\n  // Said.\n  optional int32 said = 1;\n  int32 bare_field = 2;\n"
        "  oneof bare_choice {\n    // Said.\n    int32 a = 3;\n  }\n}\n"
        "message Bare {}\n"
        "enum BareEnum {\n  BARE_ENUM_UNSPECIFIED = 0;\n}\n"
        "service BareService {\n  rpc Do(Said) returns (Bare);\n}\n"
    )
    (file,) = compile_protos(tmp_path, tmp_path / "set.pb")
    assert sorted(name.removeprefix("bare.proto: ") for name in uncommented(file)) == [
        "Bare",
        "BareEnum",
        "BareEnum.BARE_ENUM_UNSPECIFIED",
        "BareService",
        "BareService.Do",
        "Said.bare_choice",
        "Said.bare_field",
    ]
