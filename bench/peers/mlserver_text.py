"""MLServer's custom runtime over a bundle's encoder.onnx, with its adaptive batching. Runs in the peer's own venv, without Concord.

``model-settings.json`` beside it names this class and, in its parameters, the folder of the bundle, threads and tokens.
"""

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse
from tokenizers import Tokenizer


class Encoder(MLModel):
    """Texts to unit vectors."""

    async def load(self) -> bool:
        """Opens graph and tokenizer."""
        extra = self.settings.parameters.extra
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = extra["threads"]
        self._session = onnxruntime.InferenceSession(f"{extra['bundle']}/encoder.onnx", options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(f"{extra['bundle']}/tokenizer.json")
        self._tokenizer.enable_truncation(extra["tokens"])
        self._tokenizer.enable_padding()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Encodes a batch."""
        read = self._tokenizer.encode_batch(StringCodec.decode_input(payload.inputs[0]))
        ids = np.array([one.ids for one in read])
        mask = np.array([one.attention_mask for one in read])
        vectors = self._session.run(["item_vector"], {"input_ids": ids, "attention_mask": mask})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("vector", vectors)])
