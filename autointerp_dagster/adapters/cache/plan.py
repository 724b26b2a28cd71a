"""What a pass over the dataset spools, and what makes two passes the same."""

import json
import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey

_FILE = "pass.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassIdentity:
    """All that decides the non-zeros of a pass, to the last bit. Equal passes go on for another."""

    subject: Mapping[str, object]
    """JSON-ready: subject model, dataset, batch size, dtype, device, library versions."""
    coders: Mapping[LayerKey, str]
    """Identity of each layer's coder."""

    @classmethod
    def private(cls, layers: Collection[LayerKey]) -> Self:
        """Of a pass that equals no other."""
        return cls({"private": uuid.uuid4().hex}, dict.fromkeys(layers, ""))


@dataclass(frozen=True, slots=True)
class PassPlan:
    """The files of a pass. Stored beside them; what is not stored whole is not found."""

    key: str
    """Hash of ``PassIdentity.subject``; begins the folder's name."""
    n_chunks: int
    """Of the whole pass."""
    coders: Mapping[LayerKey, str]
    files: Mapping[Cell, str]
    """Name of each cell's file in the folder."""

    @classmethod
    def of(
        cls,
        identity: PassIdentity,
        ranges: Mapping[LayerKey, Sequence[LatentRange]],
        n_chunks: int,
    ) -> Self:
        """The plan of a new pass over these layers and ranges."""
        cells = [Cell(layer, latents) for layer, of in ranges.items() for latents in of]
        files = {cell: f"{i:06d}.keys" for i, cell in enumerate(cells)}
        coders = {layer: identity.coders[layer] for layer in ranges}
        return cls(json_hash(dict(identity.subject))[:16], n_chunks, coders, files)

    def covers(self, wanted: "PassPlan", folder: Path) -> bool:
        """Whether the files in ``folder`` give every cell of another plan."""
        return (
            self.key == wanted.key
            and self.n_chunks == wanted.n_chunks
            and wanted.coders.items() <= self.coders.items()
            and all(
                cell in self.files and (folder / self.files[cell]).exists() for cell in wanted.files
            )
        )

    def only(self, layers: Collection[LayerKey]) -> "PassPlan":
        """The plan without the other layers."""
        return replace(
            self,
            coders={layer: coder for layer, coder in self.coders.items() if layer in layers},
            files={cell: file for cell, file in self.files.items() if cell.layer in layers},
        )

    def to_json(self) -> bytes:
        """For the file beside the spooled ones."""
        files = [[str(cell.layer), str(cell.range), file] for cell, file in self.files.items()]
        coders = {str(layer): coder for layer, coder in self.coders.items()}
        about = {"key": self.key, "n_chunks": self.n_chunks, "coders": coders, "files": files}
        return json.dumps(about, indent=1).encode()

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The plan of a folder; null if it has none that can be read."""
        try:
            about = json.loads((folder / _FILE).read_bytes())
            coders = {LayerKey.parse(layer): coder for layer, coder in about["coders"].items()}
            files = {
                Cell(LayerKey.parse(layer), LatentRange.parse(latents)): file
                for layer, latents, file in about["files"]
            }
            return cls(about["key"], about["n_chunks"], coders, files)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            _logger.warning("%s: cannot be read, the pass begins again: %r", folder / _FILE, error)
            return None

    @staticmethod
    def path_in(folder: Path) -> Path:
        """Where the plan of a folder is stored."""
        return folder / _FILE
