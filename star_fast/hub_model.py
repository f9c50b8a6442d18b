"""A model with the methods that Hugging Face's libraries share: from_pretrained, save_pretrained, push_to_hub. Needs
huggingface_hub (pip install 'star_fast[hub]'); `star_fast.load` and `.save` read and write the same folders without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from star_fast.api import ImageModel, load
from star_fast.errors import UserError
from star_fast.model.hub import WANTED

try:
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download
except ImportError as error:
    raise UserError(
        f"HubModel: needs huggingface_hub, which cannot be imported ({error}): pip install 'star_fast[hub]', or take "
        "star_fast.load and .save"
    ) from error


class HubModel(ImageModel, PyTorchModelHubMixin):
    """An ImageModel that the hub's methods know: `HubModel(star_fast.load("runs/digits")).push_to_hub("OWNER/NAME")`,
    `HubModel.from_pretrained("OWNER/NAME")`. A folder that is here is read as it is; nothing is downloaded for it.

    Args:
        loaded: whose weights, tokenizer and record it shares.
    """

    def __init__(self, loaded: ImageModel) -> None:
        self.__dict__.update(loaded.__dict__)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the folder that `ImageModel.save` writes, whole or not at all, its own config.json and card included.

        Args:
            config: not used; the folder's says what the weights are.
            model_card_kwargs: what else `ImageModel.save` takes: {"metrics": FILE}.
            repo_id, push_to_hub, push_to_hub_kwargs: whether and where to publish it too.

        Returns:
            The URL of the commit, where it was published.

        Raises:
            UserError: as `ImageModel.save`.
        """
        self.save(save_directory, **(model_card_kwargs or {}))
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id or Path(save_directory).name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> HubModel:
        """`options`: what `star_fast.load` takes."""
        folder = model_id
        if not Path(model_id).is_dir():
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=WANTED,
            )
        return cls(load(folder, **options))
