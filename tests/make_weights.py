"""How tests/weights was made, with the extra `benchmark` and safetensors: `python tests/make_weights.py`

A 784-16-10 that PyTorch trained for 600 steps on the shipped MNIST, its weights, and its logits of five test images.
"""

from pathlib import Path

import numpy as np

from tljax import data

FOLDER = Path(__file__).parent / "weights"


def main() -> None:
    """Train, and write the weights, the card and the logits."""
    import torch
    from safetensors.torch import save_file

    task = data.load("mnist_10k")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(784, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    images = torch.tensor(np.asarray(task.train.arrays).reshape(-1, 784)) / 255
    labels = torch.tensor(np.asarray(task.train.targets), dtype=torch.long)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(600):
        rows = torch.randint(len(labels), (100,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    test = torch.tensor(np.asarray(task.test.arrays).reshape(-1, 784)) / 255
    with torch.no_grad():
        logits = net(test)
    right = logits.argmax(1).numpy() == task.test.targets
    FOLDER.mkdir(exist_ok=True)
    save_file(net.state_dict(), FOLDER / "torch.safetensors")
    np.savez(FOLDER / "logits.npz", images=np.asarray(task.test.arrays)[:5], logits=logits[:5].numpy())
    print(f"test accuracy {right.mean()}")


if __name__ == "__main__":
    main()
