"""The Triton repository: checked against Triton's own schema, and executed with a stub server."""

from __future__ import annotations

import importlib.util
import json
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
from recallseg.engines.composition import Composition
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import BundleError, ExportError, InputError
from recallseg.engines.golden import GoldenTensors, network_images, run_case
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.plans import PlanCache, PlanKey
from recallseg.engines.verdicts import Verdict
from recallseg.export.triton.repository import export_triton

MODELS = ["recallseg", *(f"recallseg_{graph}" for graph in sorted(GRAPHS))]


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
    for graph in GRAPHS:
        config = read(schema, repository, f"recallseg_{graph}")
        assert config.name == f"recallseg_{graph}"
        assert config.platform == "onnxruntime_onnx"
        assert config.max_batch_size == 0
        assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
        spec = demo.specs[graph]
        for values, tensors in ((config.input, spec.inputs), (config.output, spec.outputs)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            for value, tensor in zip(values, tensors, strict=True):
                assert value.data_type == schema.TYPE_FP32
                assert list(value.dims) == [-1 if isinstance(d, str) else d for d in tensor.shape]
        # What Triton's ONNX backend would find in the file itself.
        model = repository / f"recallseg_{graph}" / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        assert {t.name for t in session.get_inputs()} == {value.name for value in config.input}


def test_the_composition_is_a_python_model(schema: Any, repository: Path, demo: Bundle) -> None:
    config = read(schema, repository, "recallseg")
    assert config.backend == "python"
    assert [value.name for value in config.input] == ["image", "memories", "pointers"]
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
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


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
        ) -> None:
            self.model, self.outputs = model_name, requested_output_names or []
            self.inputs = inputs or []

        def exec(self) -> Response:
            file = repository / self.model / "1" / "model.onnx"
            session = sessions.setdefault(
                self.model,
                onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]),
            )
            try:
                arrays = {tensor.name(): tensor.as_numpy() for tensor in self.inputs}
                found = session.run(self.outputs, arrays)
            except Exception as error:
                return Response([], Failure(str(error)))
            return Response([Tensor(n, a) for n, a in zip(self.outputs, found, strict=True)])

    def by_name(holder: Any, name: str) -> Tensor:
        tensors = holder.inputs if isinstance(holder, Request) else holder.tensors
        return next(tensor for tensor in tensors if tensor.name() == name)

    class TritonModelException(Exception):
        pass

    module.Tensor, module.InferenceRequest, module.InferenceResponse = Tensor, Request, Response
    module.get_input_tensor_by_name = module.get_output_tensor_by_name = by_name
    module.TritonModelException, module.TritonError = TritonModelException, Failure
    module.said = []
    module.Logger = SimpleNamespace(log_warn=module.said.append)
    return module


@pytest.fixture
def server(repository: Path, schema: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The composition as the server would start it, and the stub it talks to."""
    utilities = stub_server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    spec = importlib.util.spec_from_file_location(
        "triton_model", repository / "recallseg" / "1" / "model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = read(schema, repository, "recallseg")
    text = json_format.MessageToJson(config, preserving_proto_field_name=True)
    model.initialize({"model_config": json.dumps(json.loads(text))})
    model.config = text
    return model, utilities


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
    found = {tensor.name(): tensor.as_numpy() for tensor in answer.tensors}
    for name in ("logits", "iou", "object_score"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)
    assert found["notice"].tolist() == [demo.notice.encode()]


def test_only_verified_plans_are_exported(demo: Bundle, schema: Any, tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache")
    with pytest.raises(ExportError, match="no verified tensorrt plan of graph 'embed'"):
        export_triton(demo, tmp_path / "a", engine="tensorrt", cache=cache)
    plans = []
    for graph in GRAPHS:
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
    for wrong in ({"engine": "openvino"}, {"device": "npu"}, {"prefix": "a/b"}):
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
