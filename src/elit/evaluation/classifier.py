"""A small classifier of the embedded digits: what the literature's Inception network is to photographs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elit.data import Data, sample_indices
from elit.seeding import generator, normal, torch_seeded


class Classifier(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes) and 64 features (B, 64)."""

    FEATURES = 64

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64, self.FEATURES)
        self.out = nn.Linear(self.FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.conv3(x)).amax(dim=(2, 3))
        return F.relu(self.hidden(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.out(features), features


def train_classifier(data: Data, seed: int = 0, steps: int = 1000, batch_size: int = 128) -> Classifier:
    """Trains a classifier on real images; the same seed gives the same classifier."""
    with torch_seeded(seed, "classifier"):
        model = Classifier(data.shape[0], data.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        x, y = data.batch(sample_indices(seed, step * batch_size, batch_size, len(data)))
        x = x + 0.05 * normal(generator(seed, "jitter", step), x.shape)
        loss = F.cross_entropy(model(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def classify(model: Classifier, images: Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """Returns predicted labels (M,) and features (M, 64)."""
    outputs = [model(part) for part in images.split(batch_size)]
    return torch.cat([logits.argmax(1) for logits, _ in outputs]), torch.cat([f for _, f in outputs])
