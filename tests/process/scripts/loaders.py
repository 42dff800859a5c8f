"""Two DataLoaders with workers, by fork and by spawn, as scripts have them; a spawned process finds `__main__` again."""

import multiprocessing
import sys

import torch
from torch.utils.data import DataLoader, Dataset


class Squares(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index * index)


def main(methods: list[str]) -> None:
    for method in methods:
        loader = DataLoader(
            Squares(),
            batch_size=4,
            num_workers=1,
            multiprocessing_context=multiprocessing.get_context(method),
        )
        print(method, [batch.tolist() for batch in loader], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
