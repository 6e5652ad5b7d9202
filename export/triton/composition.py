"""The model as two of Triton's Python backend: this file becomes ``1/model.py`` of both.

It is executed by the server, where RecallSeg is not installed: it may import numpy and Triton's
own module only. Other models of the repository are asked in turn, and what passes between them
stays where they left it, on the GPU if they ran there.

``segment``: the image and what was recalled come in (``encode``, ``attend``, ``decode``), logits go
out. Without memories, nothing was recalled; with points, ``correct`` takes the place of ``decode``.
``remember``: an annotated image comes in twice, as ``embed`` and as ``encode`` see it, with its
masks; its embedding, memories and pointers go out, for the client's library.
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
        self.logit_size = int(parameters["logit_size"]["string_value"])
        self.role = parameters["role"]["string_value"]
        self.no_memory = np.array(json.loads(parameters["no_memory"]["string_value"]), np.float32)
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
        answer = self._segment if self.role == "segment" else self._remember
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse(answer(request)))
            except pb_utils.TritonModelException as error:
                responses.append(
                    pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error)))
                )
        return responses

    def _segment(self, request: Any) -> list[Any]:
        memories = _given(request, "memories")
        recalled = memories is not None
        image = [_given(request, "image")]
        encoded = self._ask("encode", image, ["features", "skip0", "skip1"], here=not recalled)
        if recalled:
            conditioned = self._attend(request, encoded["features"], memories)
        else:  # SAM 2 adds one vector to the features
            plain = encoded["features"].as_numpy() + self.no_memory[None, :, None, None]
            conditioned = pb_utils.Tensor("conditioned", plain)
        inputs = [conditioned, encoded["skip0"], encoded["skip1"]]
        graph = "decode"
        if _given(request, "points") is not None:
            if recalled and memories.as_numpy().shape[0] != 1:
                raise pb_utils.TritonModelException(
                    "points are of one structure: send the memories of that one"
                )
            graph = "correct"
            inputs += self._prompts(request)
        decoded = self._ask(graph, inputs, ["logits", "iou", "object_score"])
        return [*decoded.values(), self._notice()]

    def _attend(self, request: Any, features: Any, memories: Any) -> Any:
        inputs = [features, memories]
        if self.object_pointers:
            pointers = _given(request, "pointers")
            if pointers is None:
                raise pb_utils.TritonModelException("memories come with their pointers")
            n, k = memories.as_numpy().shape[:2]
            time = np.full((n, k), self.pointer_time, np.float32)
            inputs += [pointers, pb_utils.Tensor("pointer_time", time)]
        return self._ask("attend", inputs, ["conditioned"])["conditioned"]

    def _prompts(self, request: Any) -> list[Any]:
        """Return points, their labels, and the mask before, if there was one."""
        labels = _given(request, "point_labels")
        if labels is None:
            raise pb_utils.TritonModelException("points come with their point_labels")
        prior = _given(request, "prior")
        before = pb_utils.Tensor("has_prior", np.array([prior is not None]))
        if prior is None:
            side = self.logit_size
            prior = pb_utils.Tensor("prior", np.zeros((1, 1, side, side), np.float32))
        return [_given(request, "points"), labels, prior, before]

    def _remember(self, request: Any) -> list[Any]:
        small = pb_utils.Tensor("image", _given(request, "embed_image").as_numpy())
        embedded = self._ask("embed", [small], ["embedding"])
        image = [_given(request, "image")]
        encoded = self._ask("encode", image, ["features", "skip0", "skip1"])
        inputs = [*encoded.values(), _given(request, "masks")]
        made = self._ask("memorize", inputs, ["memories", "pointers"])
        return [*embedded.values(), *made.values(), self._notice()]

    def _notice(self) -> Any:
        return pb_utils.Tensor("notice", np.array([self.notice.encode()], dtype=object))

    def _ask(
        self, graph: str, inputs: list[Any], outputs: list[str], *, here: bool = False
    ) -> dict[str, Any]:
        """Run another model of the repository; ``here``: its outputs are to be read by numpy."""
        where = {}
        if here:
            cpu = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
            where["preferred_memory"] = cpu
        response = pb_utils.InferenceRequest(
            model_name=f"{self.prefix}_{graph}",
            requested_output_names=outputs,
            inputs=inputs,
            **where,
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(
                f"model {self.prefix}_{graph}: {response.error().message()}"
            )
        return {name: pb_utils.get_output_tensor_by_name(response, name) for name in outputs}


def _given(request: Any, name: str) -> Any:
    """Return an input, or None for one that may be left out, and was."""
    return pb_utils.get_input_tensor_by_name(request, name)
