"""The published training steps in plain PyTorch, as one would write them from the papers: `training` compares with it.

DiT (arXiv 2212.09748), MaskDiT (arXiv 2306.09305), MDT v1 (arXiv 2303.14389) and SD-DiT (arXiv 2403.17004, where the
paper is silent with the defaults of `config.SDDiT`). The usual idioms, nothing tuned, and nothing shared with sddit/
but the numbers of an experiment. Each `Port.step` draws noise, runs forward and backward, and updates all weights.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sddit import config
from sddit.config import Experiment

EMA_DECAY = 0.9999

# ------------------------------------------------------------------------------------------------------------- layers


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def patchify(x: Tensor, p: int) -> Tensor:
    b, c, h, w = x.shape
    return torch.einsum("bchpwq->bhwpqc", x.reshape(b, c, h // p, p, w // p, p)).reshape(b, -1, p * p * c)


def unpatchify(x: Tensor, p: int) -> Tensor:
    b, n, d = x.shape
    side, c = math.isqrt(n), d // p**2
    return torch.einsum("bhwpqc->bchpwq", x.reshape(b, side, side, p, p, c)).reshape(b, c, side * p, side * p)


def sincos(width: int, side: int) -> Tensor:
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (grid.reshape(-1, 1) * omega for grid in torch.meshgrid([torch.arange(side)] * 2, indexing="ij"))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float().unsqueeze(0)


class RelativeBias(nn.Module):
    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2 + 3, heads) * 0.02)
        at = torch.stack(torch.meshgrid([torch.arange(side)] * 2, indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None, :] + side - 1
        self.register_buffer("index", offset[0] * (2 * side - 1) + offset[1])

    def forward(self, ids: Tensor | None) -> Tensor:
        index = self.get_buffer("index")
        bias = self.table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)
        if ids is not None:
            (b, k), h = ids.shape, bias.shape[1]
            bias = bias.expand(b, -1, -1, -1).gather(2, ids[:, None, :, None].expand(-1, h, -1, bias.shape[3]))
            bias = bias.gather(3, ids[:, None, None, :].expand(-1, h, k, -1))
        return bias


class Attention(nn.Module):
    # With a bias MDT's authors write the products out. On a CPU this is faster than the bias as `attn_mask`, under bf16
    # more than twice.
    fused_bias = False

    def __init__(self, width: int, heads: int, bias_side: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = RelativeBias(bias_side, heads) if bias_side else None

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if self.bias is None else self.bias(ids).to(q.dtype)
        if bias is None or self.fused_bias:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, condition: int, bias_side: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, bias_side)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.silu, self.adaln = nn.SiLU(), nn.Linear(condition, 6 * width)

    def forward(self, x: Tensor, c: Tensor, ids: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(self.silu(c)).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), ids)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.silu, self.adaln = nn.SiLU(), nn.Linear(condition, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(self.silu(c)).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        freqs = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        args = t[:, None].float() * freqs[None]
        return self.mlp(torch.cat([args.cos(), args.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """With a learnt null row (DiT, MDT), or as a Linear on the one-hot, which is zero for the null class (MaskDiT)."""

    def __init__(self, classes: int, width: int, one_hot: bool) -> None:
        super().__init__()
        self.classes = classes
        self.linear = nn.Linear(classes, width, bias=False) if one_hot else None
        self.table = None if one_hot else nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        if self.table is not None:
            return self.table(y)
        assert self.linear is not None
        return self.linear(F.one_hot(y, self.classes + 1)[:, :-1].float())


class Encoder(nn.Module):
    """Embedders and a stack of blocks."""

    def __init__(
        self, e: Experiment, shape: tuple[int, int, int], classes: int, *, one_hot: bool = False, cls: bool = False
    ) -> None:
        super().__init__()
        depth, self.width, self.heads = e.model.dims
        self.patch, self.side = e.model.patch, shape[1] // e.model.patch
        self.out = self.patch**2 * shape[0] * e.diffusion.outputs
        relative = isinstance(e.method, config.MDT)
        self.bias_side = self.side if relative else None
        self.patch_embed = nn.Conv2d(shape[0], self.width, self.patch, self.patch)
        self.pos_embed = nn.Parameter(sincos(self.width, self.side), requires_grad=relative)
        self.t_embedder = TimestepEmbedder(self.width)
        self.y_embedder = LabelEmbedder(classes, self.width, one_hot)
        self.cls_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02) if cls else None
        self.blocks = nn.ModuleList(Block(self.width, self.heads, self.width, self.bias_side) for _ in range(depth))

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return self.t_embedder(t) + self.y_embedder(y)

    def encode(self, x: Tensor, c: Tensor) -> Tensor:
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, c)
        return x


class Decoder(nn.Module):
    """MaskDiT's, of a fixed width."""

    def __init__(self, e: Experiment, encoder: Encoder) -> None:
        super().__init__()
        width, heads = e.model.decoder_width, e.model.decoder_heads
        self.bridge = FinalLayer(encoder.width, width, encoder.width)
        self.pos_embed = nn.Parameter(sincos(width, encoder.side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, encoder.width) for _ in range(e.model.decoder_depth))
        self.final = FinalLayer(width, encoder.out, encoder.width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.final(x, c)


def initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.data.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in network.modules():
        if isinstance(module, TimestepEmbedder | LabelEmbedder):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.normal_(linear.weight, std=0.02)
        elif isinstance(module, Block | FinalLayer):
            nn.init.zeros_(module.adaln.weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)


# ------------------------------------------------------------------------------------------------------------ masking


def take(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def random_masking(x: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As MAE: the tokens kept, their ids, the ids that undo the shuffle, and the mask, 1 where a token is removed."""
    b, n, _ = x.shape
    keep = int(n * (1 - ratio))
    ids_shuffle = torch.rand(b, n, device=x.device).argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    ids_keep = ids_shuffle[:, :keep]
    mask = torch.ones(b, n, device=x.device)
    mask[:, :keep] = 0
    return take(x, ids_keep), ids_keep, ids_restore, mask.gather(1, ids_restore)


# ----------------------------------------------------------------------------------------------------------- networks


class DiT(Encoder):
    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(e, shape, classes)
        self.final = FinalLayer(self.width, self.out, self.width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.condition(t, y)
        return unpatchify(self.final(self.encode(self.embed(x), c), c), self.patch)


class MaskDiT(Encoder):
    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(e, shape, classes, one_hot=True)
        self.decoder = Decoder(e, self)
        self.mask_token = nn.Parameter(torch.randn(1, 1, e.model.decoder_width) * 0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        c = self.condition(t, y)
        x, _, ids_restore, mask = random_masking(self.embed(x), ratio)
        x = self.decoder.bridge(self.encode(x, c), c)
        tokens = self.mask_token.to(x.dtype).expand(len(x), mask.shape[1] - x.shape[1], -1)
        x = take(torch.cat([x, tokens], dim=1), ids_restore)
        return unpatchify(self.decoder(x, c), self.patch), mask


class MDT(Encoder):
    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(e, shape, classes)
        assert isinstance(e.method, config.MDT)
        self.encoder_depth = len(self.blocks) - e.method.decoder_layers
        self.side_block = Block(self.width, self.heads, self.width, self.bias_side)
        self.decoder_pos_embed = nn.Parameter(sincos(self.width, self.side))
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.final = FinalLayer(self.width, self.out, self.width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, ratio: float | None = None) -> Tensor:
        x, c = self.embed(x), self.condition(t, y)
        ids_keep = None
        if ratio is not None:
            x, ids_keep, ids_restore, mask = random_masking(x, ratio)
        for block in self.blocks[: self.encoder_depth]:
            x = block(x, c, ids_keep)
        if ratio is not None:
            tokens = self.mask_token.to(x.dtype).expand(len(x), mask.shape[1] - x.shape[1], -1)
            x = take(torch.cat([x, tokens], dim=1), ids_restore) + self.decoder_pos_embed
            x = mask.unsqueeze(-1) * self.side_block(x, c) + (1 - mask.unsqueeze(-1)) * x
        else:
            x = x + self.decoder_pos_embed
        for block in self.blocks[self.encoder_depth :]:
            x = block(x, c)
        return unpatchify(self.final(x, c), self.patch)


class SDDiT(nn.Module):
    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(e, shape, classes, one_hot=True, cls=True)
        self.decoder = Decoder(e, self.encoder)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        tokens, c = self.encoder.embed(x), self.encoder.condition(t, y)
        visible, ids_keep, _, _ = random_masking(tokens, ratio)
        encoded = self.encoder.encode(visible, c)
        index = ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[2])
        slots = tokens.scatter(1, index, encoded[:, 1:].to(tokens.dtype))
        out = self.decoder(self.decoder.bridge(slots, c), c)
        return unpatchify(out, self.encoder.patch), encoded, ids_keep


class Head(nn.Module):
    """iBOT's."""

    def __init__(self, m: config.SDDiT, width: int) -> None:
        super().__init__()
        sizes = [width] + [m.head_hidden] * (m.head_layers - 1) + [m.head_bottleneck]
        layers: list[nn.Module] = [nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)]
        for i in range(m.head_layers):
            linear = nn.Linear(sizes[i], sizes[i + 1])
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last = weight_norm(nn.Linear(m.head_bottleneck, m.num_prototypes, bias=False))
        self.gain, self.direction = self.last.parametrizations.weight.parameters()
        self.gain.requires_grad_(False).fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))


# ---------------------------------------------------------------------------------------------------------- diffusion


class IDDPM(nn.Module):
    """Noise prediction with learnt variance: squared error plus the variational bound's term in bits."""

    def __init__(self, d: config.Diffusion) -> None:
        super().__init__()
        beta = torch.linspace(d.beta_start, d.beta_end, d.timesteps, dtype=torch.float64)
        bar = (1 - beta).cumprod(0)
        previous = F.pad(bar[:-1], (1, 0), value=1.0)
        posterior = beta * (1 - previous) / (1 - bar)
        tables = {
            "sqrt_bar": bar.sqrt(),
            "sqrt_one_minus_bar": (1 - bar).sqrt(),
            "log_beta": beta.log(),
            "log_posterior": torch.cat([posterior[1:2], posterior[1:]]).log(),
            "mean_x0": beta * previous.sqrt() / (1 - bar),
            "mean_xt": (1 - previous) * (1 - beta).sqrt() / (1 - bar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())

    def at(self, name: str, t: Tensor) -> Tensor:
        return self.get_buffer(name)[t].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.at("sqrt_bar", t) * x0 + self.at("sqrt_one_minus_bar", t) * noise

    def loss(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        eps, v = output.float().chunk(2, dim=1)
        mse = ((noise - eps) ** 2).mean(dim=(1, 2, 3))
        frac = (v + 1) / 2
        log_var = frac * self.at("log_beta", t) + (1 - frac) * self.at("log_posterior", t)
        x0_hat = (xt - self.at("sqrt_one_minus_bar", t) * eps.detach()) / self.at("sqrt_bar", t)
        mean_hat = self.at("mean_x0", t) * x0_hat + self.at("mean_xt", t) * xt
        mean, true_log_var = self.at("mean_x0", t) * x0 + self.at("mean_xt", t) * xt, self.at("log_posterior", t)
        kl = log_var - true_log_var - 1 + (true_log_var - log_var).exp() + (mean - mean_hat) ** 2 * (-log_var).exp()
        nll = -discretised_gaussian(x0, mean_hat, 0.5 * log_var)
        vb = torch.where(t == 0, nll.mean(dim=(1, 2, 3)), 0.5 * kl.mean(dim=(1, 2, 3)))
        return mse + vb / math.log(2)


def discretised_gaussian(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    upper, lower = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return p.clamp(min=1e-12).log()


class EDM:
    def __init__(self, d: config.Diffusion) -> None:
        self.d = d

    def draw(self, x0: Tensor) -> Tensor:
        return (torch.randn(len(x0), 1, 1, 1, device=x0.device) * self.d.p_std + self.d.p_mean).exp()

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees: scaled image and noise level."""
        return x / (sigma**2 + self.d.sigma_data**2).sqrt(), sigma.flatten().log() / 4

    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        total = sigma**2 + self.d.sigma_data**2
        return self.d.sigma_data**2 / total * x + sigma * self.d.sigma_data / total.sqrt() * output.float()

    def error(self, denoised: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        weight = (sigma**2 + self.d.sigma_data**2) / (sigma * self.d.sigma_data) ** 2
        return weight * (denoised - x0) ** 2


# ------------------------------------------------------------------------------------------------------ training steps


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    averages = dict(average.named_parameters())
    for name, p in model.named_parameters():
        averages[name].mul_(decay).add_(p, alpha=1 - decay)


class Port:
    """A training step of DiT; the other methods change `loss`."""

    network_class: type[nn.Module] = DiT

    def __init__(self, e: Experiment, shape: tuple[int, int, int], classes: int, device: str) -> None:
        self.experiment, self.classes, self.device = e, classes, device
        self.network = self.network_class(e, shape, classes)
        initialise(self.network)
        self.network.to(device).train()
        self.ema = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.setup()
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=e.train.lr, weight_decay=e.train.weight_decay)

    def setup(self) -> None:
        self.iddpm = IDDPM(self.experiment.diffusion).to(self.device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def drop(self, y: Tensor) -> Tensor:
        return torch.where(torch.rand(len(y), device=y.device) < self.experiment.method.class_dropout, self.classes, y)

    def loss(self, x0: Tensor, y: Tensor) -> Tensor:
        t = torch.randint(0, self.experiment.diffusion.timesteps, (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        xt = self.iddpm.q_sample(x0, t, noise)
        return self.iddpm.loss(self.network(xt, t, self.drop(y)), x0, xt, t, noise).mean()

    def step(self, x0: Tensor, y: Tensor) -> Tensor:
        """A whole training step on images x0 (B, C, H, W) with labels y (B,); the loss."""
        bf16 = self.experiment.train.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            loss = self.loss(x0, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.before_update()
        self.optimizer.step()
        update_ema(self.ema, self.network, EMA_DECAY)
        self.after_update()
        return loss.detach()

    def before_update(self) -> None:
        pass

    def after_update(self) -> None:
        pass


class MaskDiTPort(Port):
    network_class = MaskDiT

    def setup(self) -> None:
        assert isinstance(self.experiment.method, config.MaskDiT)
        self.edm, self.method = EDM(self.experiment.diffusion), self.experiment.method

    def loss(self, x0: Tensor, y: Tensor) -> Tensor:
        sigma, patch = self.edm.draw(x0), self.experiment.model.patch
        x = x0 + sigma * torch.randn_like(x0)
        output, mask = self.network(*self.edm.inputs(x, sigma), self.drop(y), self.method.mask_ratio)
        denoised = self.edm.denoised(x, sigma, output)
        error = self.edm.error(denoised, x0, sigma).mean(dim=1)
        error = F.avg_pool2d(error.unsqueeze(1), patch).flatten(1)
        visible = (error * (1 - mask)).sum(dim=1) / (1 - mask).sum(dim=1)
        target = patchify(x, patch)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        mae = ((patchify(denoised, patch) - target) ** 2).mean(dim=-1)
        mae = (mae * mask).sum(dim=1) / mask.sum(dim=1)
        return (visible + self.method.lambda_mae * mae).mean()


class MDTPort(Port):
    network_class = MDT

    def loss(self, x0: Tensor, y: Tensor) -> Tensor:
        assert isinstance(self.experiment.method, config.MDT)
        t = torch.randint(0, self.experiment.diffusion.timesteps, (len(x0),), device=x0.device)
        total = torch.zeros((), device=x0.device)
        for ratio in (None, self.experiment.method.mask_ratio):
            noise = torch.randn_like(x0)
            xt = self.iddpm.q_sample(x0, t, noise)
            total = total + self.iddpm.loss(self.network(xt, t, self.drop(y), ratio), x0, xt, t, noise).mean()
        return total


class SDDiTPort(Port):
    network_class = SDDiT
    network: SDDiT

    def setup(self) -> None:
        assert isinstance(self.experiment.method, config.SDDiT)
        self.edm, self.method, self.steps = EDM(self.experiment.diffusion), self.experiment.method, 0
        self.head = Head(self.method, self.network.encoder.width).to(self.device)
        self.teacher = copy.deepcopy(self.network.encoder).requires_grad_(False).eval()
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False).eval()
        self.centre_cls = torch.zeros(1, self.method.num_prototypes, device=self.device)
        self.centre_patch = torch.zeros(1, 1, self.method.num_prototypes, device=self.device)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.head.parameters()]

    def loss(self, x0: Tensor, y: Tensor) -> Tensor:
        m, sigma, noise = self.method, self.edm.draw(x0), torch.randn_like(x0)
        y, x = self.drop(y), x0 + sigma * noise
        output, encoded, ids_keep = self.network(*self.edm.inputs(x, sigma), y, m.mask_ratio)
        generative = self.edm.error(self.edm.denoised(x, sigma, output), x0, sigma).mean()

        assert isinstance(m.teacher_sigma, float)
        with torch.no_grad():
            low = torch.full_like(sigma, m.teacher_sigma)
            view, t = self.edm.inputs(x0 + low * noise, low)
            logits = self.teacher_head(self.teacher.encode(self.teacher.embed(view), self.teacher.condition(t, y)))
            cls, patch = self.targets(logits[:, 0], logits[:, 1:], ids_keep)
        student = F.log_softmax(self.head(encoded).float() / m.tau_student, dim=-1)
        loss_cls = -(cls * student[:, 0]).sum(dim=-1)
        loss_patch = -(patch * student[:, 1:]).sum(dim=-1).mean(dim=1)
        return generative + m.lambda_d * (loss_cls + loss_patch).mean()

    def targets(self, cls: Tensor, patch: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor]:
        """P_T of [CLS] (B, K) and of the visible patches (B, kept, K)."""
        m = self.method
        if m.centring == "sinkhorn":
            balanced = sinkhorn(patch.float().flatten(0, 1) / m.tau_teacher, m.sinkhorn_iterations)
            first = sinkhorn(cls.float() / m.tau_teacher_cls, m.sinkhorn_iterations)
            return first, take(balanced.view(patch.shape), ids_keep)
        self.means = cls.float().mean(dim=0), patch.mean(dim=1).float().mean(dim=0)
        p_cls = F.softmax((cls.float() - self.centre_cls) / m.tau_teacher_cls, dim=-1)
        visible = take(patch, ids_keep).float()
        return p_cls, F.softmax((visible - self.centre_patch) / m.tau_teacher_start, dim=-1)

    def before_update(self) -> None:
        if self.steps < self.method.prototype_freeze_steps:
            self.head.direction.grad = None

    def after_update(self) -> None:
        update_ema(self.teacher, self.network.encoder, self.method.teacher_momentum)
        update_ema(self.teacher_head, self.head, self.method.teacher_momentum)
        if self.method.centring == "ema":
            for centre, mean in zip((self.centre_cls, self.centre_patch), self.means, strict=True):
                centre.mul_(self.method.centre_momentum).add_(mean, alpha=1 - self.method.centre_momentum)
        self.steps += 1


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    q = (scores - scores.amax()).exp()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True).clamp(min=1e-30)
        q = q / q.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return q


PORTS: dict[str, type[Port]] = {"dit": Port, "maskdit": MaskDiTPort, "mdt": MDTPort, "sddit": SDDiTPort}


def diffusers_dit(experiment: Experiment, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """diffusers' DiT of the experiment's size, untrained."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    depth, width, heads = experiment.model.dims
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=shape[0],
        out_channels=shape[0] * experiment.diffusion.outputs,
        num_layers=depth,
        sample_size=shape[1],
        patch_size=experiment.model.patch,
        num_embeds_ada_norm=classes,
    )
