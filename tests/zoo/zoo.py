"""Is the layer that is found on its own, and the layout that is read into it, the right one? For the architectures of torchvision and timm: `make zoo`.

`python tests/zoo/zoo.py torchvision|timm|learner|all [--families-only] [--missing] [NAME…]`

* `torchvision`: every builder of a classifier; `timm`: the smallest model of every module of timm, and the variants in `VARIANTS`; `learner`: what fastai makes of timm's models.
* `--families-only`: the smallest of each family, no variants. `--missing`: only what is not in the table yet. Names: only these.

Where a transformer's blocks are found, a last column says whether LeGrad's map responds where the image was disturbed, too.

Weights are random: nothing is downloaded. Every line goes into its table in nbs/stories/zoo.ipynb as soon as it is known, and replaces the line of an earlier run; the others are kept."""
import gc
import json
import math
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch
from torch import nn
import torch.nn.functional as F
import torchvision.models

from fastai_cam.methods import METHODS
from fastai_cam.probe.evidence import disturbed_quadrants, moved_quadrants
from fastai_cam.probe.watch import alignment, Probe

ROOT = Path(__file__).resolve().parents[2]
N_CLASSES = 5

# Of modules that hold several architectures, one small model each, beside the smallest of the module
VARIANTS = '''
vit_wee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224 vit_base_patch32_clip_224 vit_small_patch14_dinov2
vit_small_patch14_reg4_dinov2 vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256 vit_so150m_patch16_reg4_map_256 vit_small_patch16_18x2_224 vit_base_patch16_xp_224
vit_base_patch16_rpn_224 vit_base_patch14_reg1_tipsv2 vit_base_patch16_radio_v3 flexivit_small beit3_base_patch16_224 eva_large_patch14_196 aimv2_large_patch14_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beitv2_base_patch16_224
eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384 vit_pe_spatial_tiny_patch16_512 vit_small_patch16_dinov3 vit_small_patch16_lingbot vit_small_patch16_rope_224
vit_small_patch16_rope_mixed_224 vit_small_patch16_rope_ape_224 vit_medium_patch16_rope_reg1_gap_256 eva02_base_patch16_clip_224 vit_base_patch16_sapiens2
vit_small_r26_s32_224 vit_small_resnet26d_224 vit_base_mci_224 vit_srelpos_small_patch16_224 vit_relpos_small_patch16_224 vit_relpos_medium_patch16_cls_224 vit_relpos_base_patch16_clsgap_224
samvit_base_patch16 naflexvit_base_patch16_par_gap naflexvit_base_patch16_map naflexvit_base_patch16_siglip vitamin_base_224
swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_base_window12to16_192to256 swinv2_cr_tiny_ns_224 pit_ti_distilled_224 cait_xxs36_224 coat_lite_tiny crossvit_9_dagger_240
xcit_nano_12_p16_224 twins_pcpvt_small nest_tiny_jx tnt_s_patch16_224 mvitv2_small_cls hiera_small_abswin_256 hieradet_small levit_conv_128s levit_128 visformer_small
coatnet_pico_rw_224 coatnet_0_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxvit_tiny_tf_224 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256
efficientvit_l1 efficientformer_l3 poolformer_s12 convformer_s18 caformer_s18 mixer_s32_224 mixer_b16_224 resmlp_12_224 gmixer_12_224
mobilevit_xxs mobilevitv2_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium mobilenetv3_small_100 fastvit_sa12 fastvit_mci0 repvit_m0_9 ghostnet_100 ghostnetv2_100 ghostnetv3_050
halonet26t lambda_resnet26t botnet26t_256 sebotnet33ts_256 eca_botnext26ts_256 mobileone_s0 repvgg_a0 gernet_s regnetz_b16 resnet50_clip resnet50_clip_gap gcresnext26ts bat_resnext26ts
resnet18 resnet26d resnetblur18 seresnet18 ecaresnet26t resnetv2_50x1_bit resnetv2_50d_evos dm_nfnet_f0 nf_resnet50 eca_nfnet_l0 convnext_atto convnextv2_atto convnext_tiny_hnf
efficientnet_b0 efficientnet_cc_b0_4e tf_efficientnetv2_b0 mixnet_s mobilenetv2_100 mnasnet_100 darknet53 cspresnet50 cs3edgenet_x cs3se_edgenet_x darknetaa53 hrnet_w18_ssld regnety_002 regnetv_040
poolformerv2_s12 rexnetr_100 skresnext50_32x4d legacy_senet154 legacy_seresnext26_32x4d densenetblur121d dla34 xception65p vgg11_bn vovnet39a ese_vovnet19b_dw
gemma4_vit_167m_enc qwen3_vit_88m_enc efficientvim_m1_dist csatv2_21m
'''.split()

# timm's names that fastai's vision_learner can be asked for: of every kind
LEARNER_NAMES = '''
resnet18 efficientnet_b0 convnext_atto mobilenetv3_small_100 regnety_002 densenet121 edgenext_xx_small vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
swin_tiny_patch4_window7_224 mixer_s32_224 poolformer_s12 caformer_s18 coatnet_pico_rw_224 xcit_nano_12_p16_224 efficientformer_l1
'''.split()


# -- one model

def pictures(n, size, seed=1):
    "Images that differ as photographs do, in colour, contrast and large shapes: what a network makes of plain noise is all alike"
    generator = torch.Generator().manual_seed(seed)
    shapes = F.interpolate(torch.randn(n, 3, 4, 4, generator=generator), size=size, mode='bicubic')
    return shapes + torch.randn(n, 3, 1, 1, generator=generator) + torch.rand(n, 1, 1, 1, generator=generator)*torch.randn(n, 3, *size, generator=generator)


def look_near(model):
    "Let convolutions look mostly at their centre, and tables of distances in attention at what is near: they start without any sense of place"
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and max(module.kernel_size) > max(module.stride):
            weights = torch.full(module.kernel_size, .1)
            weights[tuple(side//2 for side in module.kernel_size)] = 1
            module.weight.mul_(weights)
        if hasattr(module, 'attention_biases') and isinstance(getattr(module, 'resolution', None), tuple): # of LeViT and its relatives, by rows and columns of distance
            height, width = module.resolution
            module.attention_biases.copy_(-2.*(torch.arange(height)[:, None] + torch.arange(width)).flatten())


NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def enliven(model, n, size):
    "Make random weights say something about places, as trained ones do: no layer is zero, what is near counts most, batch norms know real activations"
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    model.train() # which also clears what was remembered of other weights
    model.eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.any(): nn.init.normal_(layer.weight, std=.02)
            if isinstance(layer, NORMS) and layer.weight is not None and not layer.weight.any(): nn.init.constant_(layer.weight, .3) # as of branches that begin at zero
        look_near(model)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train() # only these: some models return something else in training
        if norms: model(pictures(n, size))
    return model.eval()


def count_hits(moved):
    "In how many of four cases the quadrant of the activation that changed most is the one that was disturbed"
    return int((moved.argmax(1)==torch.arange(4)).sum())


def quadrants(model, x, layer=None):
    "Hits of `alignment`; where they are not four, of its mean over other images, more noise and two strengths: not again until it fits"
    hits = count_hits(alignment(model, x, layer=layer, n_times=1))
    if hits==4: return hits
    size = x.shape[-2:]
    again = [alignment(model, pictures(len(x), size, seed), layer=layer, strength=strength, n_times=2) for seed, strength in ((2, 1.), (3, 1.), (2, .1), (3, .1))]
    return count_hits(torch.stack(again).mean(0))


def first_tensor(out): return out if isinstance(out, torch.Tensor) else first_tensor(next(iter(out.values() if isinstance(out, dict) else out)))


def weighted_score(out):
    "Of all classes at once, each with another weight: a single class may be dead in a network of random weights"
    out = first_tensor(out).flatten(1)
    return (out*torch.linspace(.5, 1.5, out.shape[1])).sum(1)


def legrad_of(model, x, layer=None):
    "LeGrad's map of all items together"
    with Probe(model, layer) as probe:
        cap = probe(x)
        return METHODS['legrad'](cap, cap.score(weighted_score), last=None).sum(0)


def legrad_quadrants(model, x, layer=None):
    "In how many of four cases LeGrad's map changed most in the quadrant that was disturbed, as a verdict; '' for a network without attention of all places to all"
    try: return legrad_moves(model, x, layer)
    except ValueError as e: return '' if 'no layer of this' in str(e) else f'refused: {" ".join(str(e).split())[:100]}'


def legrad_moves(model, x, layer=None):
    "The verdict of `legrad_quadrants`, for a network whose blocks are found"
    before, moved = legrad_of(model, x, layer), 0
    if not before.any(): return 'empty' # the branch with the attention starts at zero
    for seed in range(3):
        disturbed = disturbed_quadrants(x, torch.Generator().manual_seed(seed))
        moved = moved + moved_quadrants(torch.stack([(legrad_of(model, image, layer) - before).abs() for image in disturbed])).flatten(1)
        if count_hits(moved)==4: break
    return f'{count_hits(moved)} of 4'


def check(name, build, size, family='', layer=None, batch=2):
    "Build a model, let the layer be found, and see whether it is read where the image says: a dict with one value a column, and `status`"
    start = perf_counter()
    found = dict(name=name, family=family, size=tuple(size), layer='', layout='', channels=0, grid=(), hits=None, gradient=None, status='', reason='', legrad='')
    torch.manual_seed(0)
    try:
        model = build()
        enliven(model, 16 if sum(p.numel() for p in model.parameters()) < 1e8 else 8, size)
        x = pictures(batch, size)
        with Probe(model, layer) as probe:
            cap = probe(x)
            grad = cap.grads(weighted_score)[0]
        found.update(layer=cap.names[0], layout=str(cap.layouts[0]), grid=cap.layouts[0].grid, channels=cap.acts[0].shape[1])
        found['gradient'] = bool(torch.isfinite(grad).all() and grad.any())
        del cap, grad
        found['hits'] = quadrants(model, x, layer)
        found['status'] = 'wrong' if found['hits'] < 3 or not found['gradient'] else 'ambiguous' if found['hits']==3 else 'works'
        if not found['gradient']: found['reason'] = 'the gradient is zero or not finite'
        found['legrad'] = legrad_quadrants(model, x[:1], layer)
    except ValueError as e: found.update(status='refused', reason=str(e))
    except Exception as e: found.update(status='error', reason=f'{type(e).__name__}: {e}')
    found['seconds'] = perf_counter() - start
    return found


# -- torchvision

def torchvision_names(families_only=False):
    "Every builder of a classifier; or of each module the first of its smallest"
    names = torchvision.models.list_models(module=torchvision.models)
    return smallest_of_each(names, torchvision_family, lambda name: torchvision.models.get_model(name, weights=None)) if families_only else names


def torchvision_family(name): return torchvision.models.get_model_builder(name).__module__.split('.')[-1]


def torchvision_model(name):
    "A function that builds the model, and the size of its images: not square where it takes that"
    size, options = (160, 224), {}
    if name.startswith('vit_'): # only square images
        side = 10*int(name.split('_')[-1])
        size, options = (side, side), dict(image_size=side)
    if name.startswith('maxvit'): size = (224, 224) # windows of 7 at every resolution; others than square ones fail in its attention
    if name.startswith('inception'): size, options = (224, 288), dict(init_weights=False)
    if name.startswith('googlenet'): options = dict(init_weights=False)
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=N_CLASSES, **options), size


def check_torchvision(name):
    build, size = torchvision_model(name)
    return [check(name, build, size, torchvision_family(name))]


# -- timm

def timm_family(name):
    import timm
    return timm.model_entrypoint(name).__module__.split('.')[-1]


def n_parameters(build):
    "How many parameters a model has; it is built without memory"
    with torch.device('meta'): model = build()
    return sum(p.numel() for p in model.parameters())


def smallest_of_each(names, family_of, build):
    "The name with the fewest parameters in each family"
    smallest = {}
    for name in names:
        size = n_parameters(lambda: build(name))
        if family_of(name) not in smallest or size < smallest[family_of(name)][0]: smallest[family_of(name)] = (size, name)
    return [name for size, name in sorted(smallest.values())]


def timm_names(families_only=False):
    "The smallest of each module of timm (which has some for its own tests: not these), and the variants"
    import timm
    names = [name for name in timm.list_models() if not name.startswith('test_')]
    smallest = smallest_of_each(names, timm_family, lambda name: timm.create_model(name, pretrained=False, num_classes=N_CLASSES))
    return smallest if families_only else smallest + [name for name in VARIANTS if name not in smallest]


def timm_sizes(name):
    "Options of `timm.create_model` and sizes to try, best first: not square, not the multiple of a patch, made for this size, as it was made"
    import timm
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    made_for = tuple(cfg.input_size[1:])
    sides = sorted({min(side, made_for[0]) for side in (224, 240)} | {made_for[0]})
    wide = [(side, width) for side in sides for width in (side*5//4, 32*math.ceil(side*5/4/32), 2*side)]
    if cfg.fixed_input_size:
        for size in wide: yield dict(img_size=size), size
    for size in wide: yield {}, size
    yield {}, made_for


def timm_model(name, tries=None):
    "The first of `timm_sizes` (or of `tries`) that the architecture takes: a model and the size of its images; `None` if it takes none"
    import timm
    for options, size in tries or timm_sizes(name):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, pretrained=False, num_classes=N_CLASSES, **options).eval()
            with torch.no_grad(): model(pictures(1, size))
            return model, size
        except Exception: continue
    return None


def check_timm(name):
    "One line, and another one for images that the patch size does not divide, where the architecture pads them"
    found = []
    side = 214
    for label, tries in ((name, None), (f'{name}, padded', [(dict(dynamic_img_size=True, dynamic_img_pad=True), (side, side*5//4 + 4))])):
        fitting = timm_model(name, tries)
        if fitting is not None: found.append(check(label, lambda: fitting[0], fitting[1], timm_family(name)))
        elif tries is None: found.append(dict(name=name, family=timm_family(name), size=(), layer='', layout='', channels=0, status='error', hits=None, reason='it takes none of the sizes that were tried', seconds=0.))
    return found


# -- vision_learner

def small_dls(size):
    "Four pictures of noise in two classes"
    from fastai.vision.all import DataBlock, ImageBlock, CategoryBlock, PILImage
    import numpy as np
    pictures = [PILImage.create(np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)) for i in range(4)]
    return DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: pictures[i], get_y=lambda i: i%2, splitter=lambda items: ([0, 1], [2, 3])).dataloaders(list(range(4)), bs=2, num_workers=0)


def check_learner(name):
    "What fastai makes of timm's model; images as the architecture was made for, where it takes no others"
    from fastai.vision.all import vision_learner
    import timm
    fitting, reason = None, ''
    made_for = tuple(timm.get_pretrained_cfg(name, allow_unregistered=True).input_size[1:])
    for size in ((160, 224), made_for):
        try:
            torch.manual_seed(0)
            model = vision_learner(small_dls(size), name, pretrained=False).model.cpu().eval()
            with torch.no_grad(): model(pictures(1, size))
            fitting = model, size
            break
        except Exception as e: reason = f'fastai cannot run it: {type(e).__name__}: {e}'
    if fitting is not None: return [check(name, lambda: fitting[0], fitting[1], timm_family(name))]
    return [dict(name=name, family=timm_family(name), size=made_for, layer='', layout='', channels=0, status='not run', hits=None, reason=reason, seconds=0.)]


def learner_names(families_only=False): return LEARNER_NAMES


# -- the tables in the notebook

ZOOS = dict(torchvision=(torchvision_names, check_torchvision), timm=(timm_names, check_timm), learner=(learner_names, check_learner))
TITLES = dict(torchvision='torchvision', timm='timm', learner='timm through `vision_learner`')
HEAD = '| architecture | family | images | layer | layout | channels | quadrants | LeGrad |\n|---|---|---|---|---|---|---|---|'


def as_line(found):
    "A row of the table; what went wrong stands where the number of quadrants would"
    reason = ' '.join(found['reason'].split()).replace('|', '\\|')[:300]
    verdict = dict(works='4 of 4', ambiguous='3 of 4, ambiguous').get(found['status'])
    if found['status']=='wrong': verdict = f'**wrong**, {found["hits"]} of 4' + (f': {reason}' if reason else '')
    if verdict is None: verdict = f'{found["status"]}: {reason}'
    layer = f'`{found["layer"]}`' if found['layer'] else ''
    return f'| `{found["name"]}` | {found["family"]} | {" × ".join(map(str, found["size"]))} | {layer} | {found["layout"]} | {found["channels"] or ""} | {verdict} | {found.get("legrad", "")} |'


def name_in(line): return line.split('`')[1]


def counts(lines):
    "How many architectures work, are ambiguous, refused, wrong, or did not run"
    verdicts = [line.split(' | ')[6].rstrip(' |') for line in lines]
    kinds = dict(works='4 of 4', ambiguous='3 of 4', refused='refused', wrong='**wrong**', error='error')
    found = {kind: sum(verdict.startswith(start) for verdict in verdicts) for kind, start in kinds.items()}
    found['not run'] = len(lines) - sum(found.values())
    return ', '.join(f'{"**" if kind=="works" else ""}{n} {kind}{"**" if kind=="works" else ""}' for kind, n in found.items() if n or kind in ('works', 'refused', 'wrong'))


def cell_of(notebook, zoo): return next(cell for cell in notebook['cells'] if cell['id']==f'zoo-{zoo}')


def lines_in(cell): return [line for line in ''.join(cell['source']).splitlines() if line.startswith('| `')]


def known_names(zoo):
    file = ROOT/'nbs'/'stories'/'zoo.ipynb'
    return {name_in(line) for line in lines_in(cell_of(json.loads(file.read_text()), zoo))}


def write(zoo, found):
    "Put lines into a table of the notebook, in the place of earlier ones of the same names"
    file = ROOT/'nbs'/'stories'/'zoo.ipynb'
    notebook = json.loads(file.read_text())
    cell = cell_of(notebook, zoo)
    lines = {name_in(line): line if line.count(' | ') > 6 else f'{line} |' for line in lines_in(cell)} # those from before the last column
    lines.update({name_in(line): line for line in map(as_line, found)})
    ordered = sorted(lines.values(), key=lambda line: (line.split(' | ')[1], name_in(line))) # by family, then by name
    libraries = ', '.join(f'{package} {version(package)}' for package in dict(torchvision=('torch', 'torchvision'), timm=('torch', 'timm'), learner=('torch', 'fastai', 'timm'))[zoo])
    text = f'## {TITLES[zoo]}\n\n{len(ordered)} lines, {len({line.split(" | ")[1] for line in ordered})} families: {counts(ordered)}. {libraries}.\n\n{HEAD}\n' + '\n'.join(ordered)
    cell['source'] = text.splitlines(keepends=True)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


def main(words):
    options, words = {word for word in words if word.startswith('--')}, [word for word in words if not word.startswith('--')]
    zoo, *names = words or ['all']
    wrong = (options - {'--families-only', '--missing'}) | ({zoo} - {*ZOOS, 'all'})
    if wrong: sys.exit(f'{", ".join(sorted(wrong))}: not known. {__doc__}')
    for one in ZOOS if zoo=='all' else [zoo]:
        list_names, check_one = ZOOS[one]
        known = known_names(one) if '--missing' in options else set()
        for name in names or list_names('--families-only' in options):
            if name in known: continue
            found = check_one(name)
            for line in found: print(f'{as_line(line)} {line["seconds"]:.1f} s', flush=True)
            write(one, found)
            gc.collect()


if __name__=='__main__':
    warnings.simplefilter('ignore')
    main(sys.argv[1:])
