"""The composition as a model of Triton's Python backend: this file becomes ``1/model.py``.

It is executed by the server, where RecallSeg is not installed: it may import numpy and Triton's
own module only. The image and the recalled memories come in, three models are asked in turn
(``encode``, ``attend``, ``decode``), and the logits go out; what passes between the models stays
where they left it, on the GPU if they ran there.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance; Triton calls the methods by these names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the constants that the repository was written with."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.prefix = parameters["prefix"]["string_value"]
        self.pointer_time = float(parameters["pointer_time"]["string_value"])
        self.object_pointers = parameters["object_pointers"]["string_value"] == "true"
        self.notice = parameters["notice"]["string_value"]
        reports = parameters["engine"]["string_value"] == "onnxruntime"
        if reports and os.environ.get("ORT_DISABLE_TELEMETRY", "").lower() not in ("1", "true"):
            # The server has loaded it by now: this process cannot switch it off for the server.
            pb_utils.Logger.log_warn(
                "this server may run an ONNX Runtime that reports to its maker (from version 1.29 "
                "on): start tritonserver with ORT_DISABLE_TELEMETRY=1 in its environment"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; one that fails does not take the others with it."""
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse(self._segment(request)))
            except pb_utils.TritonModelException as error:
                responses.append(
                    pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error)))
                )
        return responses

    def _segment(self, request: Any) -> list[Any]:
        def given(name: str) -> Any:
            return pb_utils.get_input_tensor_by_name(request, name)

        memories = given("memories")
        encoded = self._ask("encode", [given("image")], ["features", "skip0", "skip1"])
        inputs = [encoded["features"], memories]
        if self.object_pointers:
            n, k = memories.as_numpy().shape[:2]
            time = np.full((n, k), self.pointer_time, np.float32)
            inputs += [given("pointers"), pb_utils.Tensor("pointer_time", time)]
        conditioned = self._ask("attend", inputs, ["conditioned"])["conditioned"]
        decoded = self._ask(
            "decode",
            [conditioned, encoded["skip0"], encoded["skip1"]],
            ["logits", "iou", "object_score"],
        )
        notice = np.array([self.notice.encode()], dtype=object)
        return [*decoded.values(), pb_utils.Tensor("notice", notice)]

    def _ask(self, graph: str, inputs: list[Any], outputs: list[str]) -> dict[str, Any]:
        """Run another model of the repository."""
        response = pb_utils.InferenceRequest(
            model_name=f"{self.prefix}_{graph}",
            requested_output_names=outputs,
            inputs=inputs,
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(
                f"model {self.prefix}_{graph}: {response.error().message()}"
            )
        return {name: pb_utils.get_output_tensor_by_name(response, name) for name in outputs}
