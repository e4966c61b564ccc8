"""A second, slow statement of what EVEREST computes: numpy, float64, loops, one clip at a time.

It shares no code with the package. Tests hold the model to it.
"""

import itertools
import math

import numpy as np


def share(ratio, count):
    """Return floor(ratio * count), the product taken exactly on the ratio as it is written."""
    from fractions import Fraction

    return math.floor(Fraction(repr(ratio)) * count)


# ------------------------------------------------------------------ tokens


def cut(clip, tubelet, patch):
    """Cut a clip (T, C, H, W) into a list of blocks (C, tubelet, patch, patch): slots, then rows, then columns."""
    frames, _, height, width = clip.shape
    blocks = []
    for first_frame in range(0, frames, tubelet):
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                block = clip[first_frame : first_frame + tubelet, :, top : top + patch, left : left + patch]
                blocks.append(np.swapaxes(block, 0, 1))
    return blocks


def embed(clip, weight, bias):
    """Project the blocks of a clip (T, C, H, W) with a kernel (D, C, tubelet, patch, patch) to tokens (N, D)."""
    tubelet, patch = weight.shape[2], weight.shape[3]
    return np.array([[(kernel * block).sum() for kernel in weight] for block in cut(clip, tubelet, patch)]) + bias


def positions(count, width):
    """Return the sine (even channels) and cosine (odd channels) table (count, width) of base 10000."""
    table = np.zeros((count, width))
    for place in range(count):
        for channel in range(width):
            angle = place / 10000 ** (channel // 2 * 2 / width)
            table[place, channel] = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    return table


# ------------------------------------------------------------------ selection


def scores(tokens, slots):
    """Return how far each token (N, D) lies from the one a slot before it; slot 0 takes slot 1's scores."""
    places = len(tokens) // slots
    result = np.zeros(len(tokens))
    for slot in range(1, slots):
        for place in range(places):
            here, before = slot * places + place, (slot - 1) * places + place
            result[here] = math.sqrt(((tokens[here] - tokens[before]) ** 2).sum())
    result[:places] = result[places : 2 * places]
    return result


def camera_moves(slots, scale):
    """Return by how many pixels, in y and x, the picture of slots (t, tubelet, C, H, W) moved from the slot before."""
    return [camera_move(here, before, scale) for before, here in itertools.pairwise(slots)]


def camera_move(here, before, scale):
    """Search the step of least difference on ever larger frames; (0, 0) where it explains less than a twentieth."""
    pair = [slot.mean(axis=(0, 1)) - slot.mean() for slot in (here, before)]
    levels = [pair]
    while min(levels[-1][0].shape) >= 2 * 28:
        levels.append([halved(frame) for frame in levels[-1]])
    reach = margin = tuple(side // 10 for side in levels[-1][0].shape)
    move = (0, 0)
    for number, level in enumerate(reversed(levels)):
        if number:
            move, reach, margin = tuple(2 * part for part in move), (1, 1), tuple(2 * part + 1 for part in margin)
        steps = [(y, x) for y in range(-reach[0], reach[0] + 1) for x in range(-reach[1], reach[1] + 1)]
        steps = sorted(steps, key=lambda step: abs(step[0]) + abs(step[1]))
        moves = [(move[0] + y, move[1] + x) for y, x in steps]
        costs = [difference(*level, each, margin, scale) for each in moves]
        best = costs.index(min(costs))
        move = moves[best]
    return move if costs[best] < 0.95 * difference(*levels[0], (0, 0), margin, scale) else (0, 0)


def halved(frame):
    """Return the means of the squares of two by two pixels; a last odd row or column is left out."""
    height, width = (side // 2 * 2 for side in frame.shape)
    frame = frame[:height, :width]
    return (frame[::2, ::2] + frame[1::2, ::2] + frame[::2, 1::2] + frame[1::2, 1::2]) / 4


def difference(here, before, move, margin, scale):
    """Return the mean difference of two frames (H, W), the second moved, of the pixels a margin from the edges."""
    height, width = here.shape
    stride = 2 if min(height, width) >= 4 * 28 else 1
    differences = []
    for y in range(margin[0], height - margin[0], stride):
        for x in range(margin[1], width - margin[1], stride):
            differences.append(min(abs(here[y, x] - before[y - move[0], x - move[1]]), 8 / 255 / scale))
    return sum(differences) / len(differences)


def changes_beside_camera(slots, moves):
    """Return each slot (tubelet, C, H, W) less the one before it, moved; 0 where that one showed nothing."""
    changes = []
    for before, here, (down, right) in zip(slots[:-1], slots[1:], moves, strict=True):
        change = np.zeros_like(here)
        height, width = here.shape[-2:]
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - right < width:
                    change[..., y, x] = here[..., y, x] - before[..., y - down, x - right]
        changes.append(change)
    return changes


def compensated_scores(clip, weight, scale):
    """Score the tokens of a clip (T, C, H, W) by what changes beside the camera's motion; slot 0 as slot 1."""
    slots = list(clip.reshape(-1, weight.shape[2], *clip.shape[1:]))
    changes = changes_beside_camera(slots, camera_moves(slots, scale))
    found = [np.sqrt((embed(change, weight, 0.0) ** 2).sum(axis=1)) for change in changes]
    return np.concatenate([found[0], *found])


def shared(scores, total, least, most):
    """Return how many tokens each clip of scores (B, N) has, if the batch takes `total` of highest score one by one."""
    counts = [least] * len(scores)
    waiting = [sorted(clip, reverse=True) for clip in scores]
    while sum(counts) < total:
        able = [i for i, count in enumerate(counts) if count < most]
        winner = max(able, key=lambda i: (waiting[i][counts[i]], -i))
        counts[winner] += 1
    return counts


def above(scores, threshold, least, most):
    """Return how many tokens of each clip have a score above the threshold, within bounds."""
    return [min(max(sum(score > threshold for score in clip), least), most) for clip in scores]


def top(values, count):
    """Return the indices of the `count` largest values, largest first, the lower index first where they tie."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def split(informative, noise, visible_count):
    """Permute the informative ids, given in order of falling score, by their noise; return visible and target ids."""
    order = sorted(range(len(informative)), key=lambda index: noise[index])
    permuted = [informative[index] for index in order]
    return permuted[:visible_count], permuted[visible_count:]


def informative_per_slot(candidate_tokens, slots, ratio):
    """Count how many of the informative tokens among all candidates lie in each slot."""
    places = len(candidate_tokens) // slots
    counts = [0] * slots
    for index in top(scores(candidate_tokens, slots), share(ratio, len(candidate_tokens))):
        counts[index // places] += 1
    return counts


def choose_slots(counts, wanted):
    """Return the `wanted` slots of the largest counts, in time order; the earlier slot wins a tie."""
    return sorted(top(counts, wanted))


def inclusion_probabilities(counts, wanted):
    """Return each slot's probability to be among `wanted` slots drawn one by one, in proportion to their counts."""
    result = np.zeros(len(counts))

    def draw(chosen, probability):
        if len(chosen) == wanted:
            for slot in chosen:
                result[slot] += probability
            return
        left = sum(count for slot, count in enumerate(counts) if slot not in chosen)
        for slot, count in enumerate(counts):
            if slot not in chosen and count:
                draw((*chosen, slot), probability * count / left)

    draw((), 1.0)
    return result


# ------------------------------------------------------------------ pre-training targets


def pixel_target(clip, token, tubelet, patch, mean, std, normalise):
    """Return the pixels (tubelet * patch * patch * C,) of one token, un-normalised to [0, 1]; channel fastest."""
    block = cut(clip, tubelet, patch)[token]
    pixels = []
    for channel in range(len(block)):
        values = block[channel] * std[channel] + mean[channel]
        if normalise:
            mu = values.mean()
            variance = ((values - mu) ** 2).sum() / (values.size - 1)
            values = (values - mu) / (math.sqrt(variance) + 1e-6)
        pixels.append(values)
    target = [
        pixels[channel][frame, row, column]
        for frame in range(tubelet)
        for row in range(patch)
        for column in range(patch)
        for channel in range(len(pixels))
    ]
    return np.array(target)


# ------------------------------------------------------------------ transformer


def layer_norm(x, weight, bias, eps):
    """Normalise each row of x (N, D)."""
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps) * weight + bias


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(x, query, key, value, output, heads):
    """Multi-head self-attention over x (N, D); each projection is a pair (weight, bias)."""
    q, k, v = (x @ weight.T + bias for weight, bias in (query, key, value))
    size = x.shape[1] // heads
    mixed = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        mixed.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
    return np.concatenate(mixed, axis=1) @ output[0].T + output[1]


def block(x, layer, heads, eps, activation):
    """One pre-norm transformer block; `layer` holds norm1, query, key, value, output, norm2, fc1, fc2 as pairs."""
    attended = attention(
        layer_norm(x, *layer["norm1"], eps), *(layer[name] for name in ("query", "key", "value", "output")), heads
    )
    x = x + attended
    hidden = activation(layer_norm(x, *layer["norm2"], eps) @ layer["fc1"][0].T + layer["fc1"][1])
    return x + hidden @ layer["fc2"][0].T + layer["fc2"][1]
