"""The Triton repository: checked against Triton's own schema, and executed with a stub server."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format, text_format
from support.fake_bundle import make_fake_bundle

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition, Features, Prediction
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import BundleError, ExportError, InputError
from recallseg.engines.golden import GoldenTensors, network_images, run_case
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.plans import PlanCache, PlanKey
from recallseg.engines.verdicts import Verdict
from recallseg.export.sharing import share_weights
from recallseg.export.triton.repository import export_triton
from recallseg.export.writing import write_manifest

EVERY = (*GRAPHS, "correct")
MODELS = sorted(["recallseg", "recallseg_remember", *(f"recallseg_{graph}" for graph in EVERY)])


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


@pytest.fixture(scope="module")
def repository(demo: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_triton(demo, tmp_path_factory.mktemp("triton") / "models", device="cpu")


@pytest.fixture(scope="module")
def schema() -> Any:
    """``ModelConfig`` as NVIDIA's client ships it, without the client's own dependencies."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient, which brings Triton's schema, is not installed")
    file = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made by the protobuf compiler of the last major version
        spec.loader.exec_module(module)
    return module


def read(schema: Any, repository: Path, model: str) -> Any:
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, schema.ModelConfig())


def test_every_configuration_is_one_of_triton(schema: Any, repository: Path, demo: Bundle) -> None:
    assert sorted(path.name for path in repository.iterdir()) == MODELS
    kinds = {"float32": schema.TYPE_FP32, "int32": schema.TYPE_INT32, "bool": schema.TYPE_BOOL}
    for graph in EVERY:
        config = read(schema, repository, f"recallseg_{graph}")
        assert config.name == f"recallseg_{graph}"
        assert config.platform == "onnxruntime_onnx"
        assert config.max_batch_size == 0
        assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
        spec = demo.specs[graph]
        for values, tensors in ((config.input, spec.inputs), (config.output, spec.outputs)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            for value, tensor in zip(values, tensors, strict=True):
                assert value.data_type == kinds[tensor.dtype]
                assert list(value.dims) == [-1 if isinstance(d, str) else d for d in tensor.shape]
        # What Triton's ONNX backend would find in the file itself.
        model = repository / f"recallseg_{graph}" / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        assert {t.name for t in session.get_inputs()} == {value.name for value in config.input}


def test_the_composition_is_a_python_model(schema: Any, repository: Path, demo: Bundle) -> None:
    config = read(schema, repository, "recallseg")
    assert config.backend == "python"
    prompts = ["points", "point_labels", "prior"]
    assert [v.name for v in config.input] == ["image", "memories", "pointers", *prompts]
    assert [value.optional for value in config.input] == [False, *5 * [True]]
    assert json.loads(config.parameters["no_memory"].string_value) == list(demo.no_memory or ())
    assert [v.name for v in config.output] == ["logits", "iou", "object_score", "notice"]
    assert config.parameters["notice"].string_value == demo.notice
    assert float(config.parameters["pointer_time"].string_value) == demo.memory.pointer_time


def test_a_schema_that_accepted_everything_would_prove_nothing(
    schema: Any, repository: Path
) -> None:
    text = (repository / "recallseg" / "config.pbtxt").read_text(encoding="utf-8")
    for wrong in (text.replace("TYPE_FP32", "TYPE_FLOAT"), text.replace("backend", "backends")):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, schema.ModelConfig())


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self.array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self.array


class OnDevice(Tensor):
    """What another model left on the GPU: Triton gives it to models, not to numpy."""

    def as_numpy(self) -> Any:
        raise RuntimeError("the tensor is on the GPU")


class Failure:
    def __init__(self, text: str) -> None:
        self._text = text

    def message(self) -> str:
        return self._text


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Failure | None = None) -> None:
        self.tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Failure | None:
        return self._error


def stub_server(repository: Path) -> Any:
    """Return ``triton_python_backend_utils`` whose requests run the repository's ONNX files."""
    module: Any = ModuleType("triton_python_backend_utils")
    sessions: dict[str, Any] = {}

    class Request:
        def __init__(
            self,
            model_name: str = "",
            requested_output_names: list[str] | None = None,
            inputs: list[Tensor] | None = None,
            preferred_memory: str = "wherever",
        ) -> None:
            self.model, self.outputs = model_name, requested_output_names or []
            self.inputs = inputs or []
            self.memory = preferred_memory

        def exec(self) -> Response:
            file = repository / self.model / "1" / "model.onnx"
            session = sessions.setdefault(
                self.model,
                onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]),
            )
            try:
                arrays = {tensor.name(): tensor.array for tensor in self.inputs}
                found = session.run(self.outputs, arrays)
            except Exception as error:
                return Response([], Failure(str(error)))
            kind = Tensor if self.memory == "cpu" else OnDevice
            return Response([kind(n, a) for n, a in zip(self.outputs, found, strict=True)])

    def by_name(holder: Any, name: str) -> Tensor | None:
        tensors = holder.inputs if isinstance(holder, Request) else holder.tensors
        return next((tensor for tensor in tensors if tensor.name() == name), None)

    class TritonModelException(Exception):
        pass

    module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, Request, Response
    module.get_input_tensor_by_name = module.get_output_tensor_by_name = by_name
    module.TritonModelException, module.TritonError = TritonModelException, Failure
    module.TRITONSERVER_MEMORY_CPU = "cpu"
    module.PreferredMemory = lambda kind, number: kind
    module.said = []
    module.Logger = SimpleNamespace(log_warn=module.said.append)
    return module


def start(repository: Path, name: str, schema: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a composition as the server would, with the stub that it talks to."""
    utilities = stub_server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    spec = importlib.util.spec_from_file_location(
        "triton_model", repository / name / "1" / "model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = read(schema, repository, name)
    text = json_format.MessageToJson(config, preserving_proto_field_name=True)
    model.initialize({"model_config": json.dumps(json.loads(text))})
    model.config = text
    return model, utilities


@pytest.fixture
def server(repository: Path, schema: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    return start(repository, "recallseg", schema, monkeypatch)


def ask(server: tuple[Any, Any], **given: Any) -> dict[str, Any]:
    """Return what a composition answers to arrays by name."""
    model, utilities = server
    inputs = [Tensor(name, array) for name, array in given.items()]
    (answer,) = model.execute([utilities.InferenceRequest(inputs=inputs)])
    if answer.has_error():
        raise RuntimeError(answer.error().message())
    return {tensor.name(): tensor.array for tensor in answer.tensors}


def test_a_server_whose_onnxruntime_may_report_to_its_maker_is_told(
    server: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, utilities = server
    assert utilities.said == []  # importing recallseg switched it off here
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    model.initialize({"model_config": model.config})
    assert "start tritonserver with ORT_DISABLE_TELEMETRY=1" in utilities.said[0]
    plans = model.config.replace('"string_value": "onnxruntime"', '"string_value": "tensorrt"')
    model.initialize({"model_config": plans})
    assert len(utilities.said) == 1


def test_the_composition_gives_what_ours_gives(server: tuple[Any, Any], demo: Bundle) -> None:
    model, utilities = server
    golden = GoldenTensors.load(demo.golden_file)
    engines = load_engines(
        demo, "onnxruntime-cpu", variants=("portable",), options=EngineOptions(threads=1)
    )
    expected = run_case(
        golden.case, Composition(engines), demo.geometry, demo.normalisation, demo.memory
    )
    image = network_images(golden.case, demo.geometry.image_size, demo.normalisation["encode"])[-1]
    given = {"image": image, "memories": expected["memories"], "pointers": expected["pointers"]}
    right = utilities.InferenceRequest(inputs=[Tensor(n, a) for n, a in given.items()])
    bad = {**given, "image": image[:, :, 1:]}
    wrong = utilities.InferenceRequest(inputs=[Tensor(n, a) for n, a in bad.items()])
    failed, answer = model.execute([wrong, right])
    assert failed.has_error()
    assert "recallseg_encode" in failed.error().message()
    assert not answer.has_error()
    found = {tensor.name(): tensor.array for tensor in answer.tensors}
    for name in ("logits", "iou", "object_score"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
    assert found["notice"].tolist() == [demo.notice.encode()]


def test_what_is_remembered_is_what_a_library_stores(
    repository: Path, schema: Any, monkeypatch: pytest.MonkeyPatch, demo: Bundle
) -> None:
    config = read(schema, repository, "recallseg_remember")
    assert [value.name for value in config.input] == ["embed_image", "image", "masks"]
    assert [value.optional for value in config.input] == [False] * 3
    side = demo.geometry.image_size
    rng = np.random.default_rng(1)
    image = rng.normal(0, 1, (1, 3, side, side)).astype(np.float32)
    small = rng.normal(0, 1, (1, 3, *demo.specs["embed"].inputs[0].shape[2:])).astype(np.float32)
    masks = np.zeros((2, 1, side, side), np.float32)
    masks[0, 0, 9:90, 9:90] = masks[1, 0, 50:200, 30:60] = 1
    remember = start(repository, "recallseg_remember", schema, monkeypatch)
    found = ask(remember, embed_image=small, image=image, masks=masks)
    engines = Composition(load_engines(demo, "onnxruntime-cpu", options=EngineOptions(threads=1)))
    expected = {
        name: np.zeros(tensor.resolve(n=2), np.float32)
        for graph in ("embed", "memorize")
        for name, tensor in ((t.name, t) for t in demo.specs[graph].outputs)
    }
    engines.embed(small, expected["embedding"])
    features = Features.allocate(demo.geometry)
    engines.encode(image, features)
    engines.memorize(features, masks, expected["memories"], expected["pointers"])
    assert {*found} == {*expected, "notice"}
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4)


def test_nothing_recalled_is_what_ours_makes_of_it(server: tuple[Any, Any], demo: Bundle) -> None:
    side = demo.geometry.image_size
    image = np.random.default_rng(2).normal(0, 1, (1, 3, side, side)).astype(np.float32)
    found = ask(server, image=image)
    engines = Composition(load_engines(demo, "onnxruntime-cpu", options=EngineOptions(threads=1)))
    features, prediction = Features.allocate(demo.geometry), Prediction.allocate(demo.geometry, 1)
    engines.encode(image, features)
    plain = np.asarray(demo.no_memory, np.float32)[None, :, None, None]
    prediction.conditioned[:] = features.features + plain
    engines.decode(features, prediction)
    np.testing.assert_allclose(found["logits"], prediction.logits, rtol=1e-3, atol=1e-3)
    memories = np.zeros((1, 1, demo.geometry.tokens, demo.geometry.memory_dim), np.float32)
    with pytest.raises(RuntimeError, match="memories come with their pointers"):
        ask(server, image=image, memories=memories)


def test_points_go_to_the_graph_that_corrects(
    schema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_fake_bundle(tmp_path / "fake", correct=True)
    repository = export_triton(bundle, tmp_path / "models", device="cpu")
    config = read(schema, repository, "recallseg_correct")
    kinds = {value.name: value.data_type for value in config.input}
    assert (kinds["point_labels"], kinds["has_prior"]) == (schema.TYPE_INT32, schema.TYPE_BOOL)
    config = read(schema, repository, "recallseg")
    assert [value.name for value in config.input if value.optional] == [
        *("memories", "pointers", "points", "point_labels", "prior")
    ]
    model, utilities = start(repository, "recallseg", schema, monkeypatch)
    asked: dict[str, dict[str, Any]] = {}

    def exec_(request: Any) -> Response:
        arrays = {tensor.name(): tensor.array for tensor in request.inputs}
        graph = request.model.removeprefix("recallseg_")
        asked[graph] = arrays
        spec = bundle.specs[graph]
        symbols: dict[str, int] = {}
        for tensor in spec.inputs:  # each as the graph takes it
            tensor.bind(arrays[tensor.name], symbols, graph)
        assert {*arrays} == {tensor.name for tensor in spec.inputs}
        made = [
            np.zeros(tensor.resolve(**{"n": 1, **symbols}), tensor.dtype) for tensor in spec.outputs
        ]
        return Response([Tensor(t.name, a) for t, a in zip(spec.outputs, made, strict=True)])

    monkeypatch.setattr(utilities.InferenceRequest, "exec", exec_)
    g = bundle.geometry
    image = np.zeros((1, 3, g.image_size, g.image_size), np.float32)
    points, labels = np.zeros((1, 2, 2), np.float32), np.ones((1, 2), np.int32)
    ask((model, utilities), image=image, points=points, point_labels=labels)
    assert [*asked] == ["encode", "correct"]
    assert asked["correct"]["has_prior"].tolist() == [False]
    prior = np.ones((1, 1, g.logit_size, g.logit_size), np.float32)
    memories = np.zeros((1, 3, g.tokens, g.memory_dim), np.float32)
    pointers = np.zeros((1, 3, g.channels), np.float32)
    more = {"points": points, "point_labels": labels, "prior": prior, "pointers": pointers}
    asked.clear()
    ask((model, utilities), image=image, memories=memories, **more)
    assert [*asked] == ["encode", "attend", "correct"]
    assert asked["correct"]["has_prior"].tolist() == [True]
    asked.clear()
    ask((model, utilities), image=image, memories=memories, pointers=pointers)
    assert [*asked] == ["encode", "attend", "decode"]
    two = {"memories": np.repeat(memories, 2, 0), "pointers": np.repeat(pointers, 2, 0)}
    with pytest.raises(RuntimeError, match="points are of one structure"):
        ask((model, utilities), image=image, **{**more, **two})
    with pytest.raises(RuntimeError, match="points come with their point_labels"):
        ask((model, utilities), image=image, points=points)


def test_weights_that_a_bundle_stores_once_come_with_every_graph(
    demo: Bundle, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(demo.path, shared)
    manifest = json.loads((shared / "manifest.json").read_text())
    share_weights(shared, manifest["graphs"])
    write_manifest(shared, manifest)
    bundle = Bundle.open(shared)
    assert bundle.weights_files("decode", "portable", "fp32")
    repository = export_triton(bundle, tmp_path / "models", device="cpu")
    for graph in GRAPHS:
        model = repository / f"recallseg_{graph}" / "1" / "model.onnx"
        onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])


def test_only_verified_plans_are_exported(demo: Bundle, schema: Any, tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache")
    with pytest.raises(ExportError, match="no verified tensorrt plan of graph 'embed'"):
        export_triton(demo, tmp_path / "a", engine="tensorrt", cache=cache)
    plans = []
    for graph in EVERY:
        key = PlanKey(
            graph,
            demo.graph_digest(graph, "portable", "fp32"),
            "tensorrt",
            "10.3.0",
            "fp32",
            "current on sm89 L4",
            {"n": [1, 1, 4], "k": [1, 4, 16]},
            {},
        )
        with cache.building(key):
            plans.append(cache.store(key, graph.encode(), {"time": "1"}))
    with pytest.raises(ExportError, match="no verified"):
        export_triton(demo, tmp_path / "a", engine="tensorrt", cache=cache)
    for plan in plans:
        plan.verdicts.record(Verdict(True, "sm89 L4, driver 12.8", demo.golden_digest))
    folder = export_triton(demo, tmp_path / "a", engine="tensorrt", cache=cache, prefix="ward3")
    config = read(schema, folder, "ward3_attend")
    assert config.platform == "tensorrt_plan"
    assert config.parameters["tensorrt"].string_value == "10.3.0"
    assert (folder / "ward3_attend" / "1" / "model.plan").read_bytes() == b"attend"
    plans[0].verdicts.record(Verdict(False, "another", demo.golden_digest, (), "wrong"))
    with pytest.raises(ExportError, match="no verified"):
        export_triton(demo, tmp_path / "b", engine="tensorrt", cache=cache)
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".b*"))


def test_without_object_pointers(schema: Any, tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "fake", object_pointers=False)
    config = read(schema, export_triton(bundle, tmp_path / "models"), "recallseg")
    assert [value.name for value in config.input] == ["image", "memories"]
    assert config.parameters["object_pointers"].string_value == "false"


def test_bad_requests(demo: Bundle, tmp_path: Path) -> None:
    for wrong in (
        *({"engine": "openvino"}, {"device": "npu"}, {"prefix": "a/b"}),
        {"precision": "fp32-native"},
    ):
        with pytest.raises(InputError):
            export_triton(demo, tmp_path / "models", **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        export_triton(demo, tmp_path / "models", engine="tensorrt", device="cpu")
    with pytest.raises(BundleError, match="fp16"):
        export_triton(demo, tmp_path / "models", precision="fp16")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "models").mkdir()
    with pytest.raises(ExportError, match="exists"):
        export_triton(demo, tmp_path / "models")


def test_a_repository_that_does_not_fit_is_not_begun(demo: Bundle, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            ExportError, match=r"repository .*models cannot be written: .*File too large"
        ):
            export_triton(demo, tmp_path / "models", device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
