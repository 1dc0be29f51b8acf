"The layer and its layout are found in the right place, whatever the architecture: small members of the families of torchvision and timm. All of them: `make zoo`. What `make test` runs of this file is listed in conftest."
import pytest
import timm
import torch
import torchvision.models

from fastai_cam.probe.layout import Layout
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.scan import LayerScan
from zoo.zoo import check, enliven, legrad_quadrants, pictures, small_dls, torchvision_family, torchvision_names

SMALL, EVEN = (96, 128), (128, 160)

# One of each module of torchvision: size of the images, options of the builder
TORCHVISION = dict(
    alexnet=(SMALL, {}), convnext_tiny=(SMALL, {}), densenet121=(SMALL, {}), efficientnet_b0=(SMALL, {}), googlenet=(SMALL, dict(init_weights=False)), inception_v3=(EVEN, dict(init_weights=False)),
    maxvit_t=((128, 128), {}), mnasnet0_5=(SMALL, {}), mobilenet_v2=(SMALL, {}), mobilenet_v3_small=(SMALL, {}), regnet_y_400mf=(SMALL, {}), resnet18=(SMALL, {}), shufflenet_v2_x0_5=(SMALL, {}),
    squeezenet1_1=(SMALL, {}), swin_t=(SMALL, {}), vgg11=(SMALL, dict(init_weights=False)), vit_b_32=((128, 128), {}))
# The two that are slow, with fewer blocks and channels
TORCHVISION_SHALLOW = dict(
    maxvit_t=lambda: torchvision.models.MaxVit(input_size=(128, 128), stem_channels=16, partition_size=4, block_channels=[16, 32], block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0., num_classes=5),
    vit_b_32=lambda: torchvision.models.VisionTransformer(image_size=128, patch_size=16, num_layers=6, num_heads=3, hidden_dim=72, mlp_dim=144, num_classes=5))

# Of timm, models that take images of any size, and models that are made for a size
ANY_SIZE = '''
test_byobnet test_convnext cpubone_nano cs3darknet_focus_s cspnext_tiny dla46x_c edgenext_xx_small test_efficientnet efficientvit_b0 fasternet_t0 fastvit_t8
ghostnet_050 hardcorenas_b hgnetv2_b0 iformer_t inception_next_atto lcnet_035 lcnetv2_small test_mambaout mobilevit_xxs mobilevitv2_050 test_nfnet poolformerv2_s12 pvt_v2_b0
regnetx_002 repghostnet_050 repvit_m1 test_resnet resnetv2_18 rexnet_100 legacy_seresnet18 skresnet18 starnet_s050 tiny_vit_5m_224 ese_vovnet19b_slim_dw
sam2_hiera_tiny lowformer_b0 nf_regnet_b0 lambda_resnet26t efficientvim_m1 mobilenetv4_conv_small shvit_s1 davit_tiny mvitv2_tiny
'''.split()
MADE_FOR_A_SIZE = '''
test_vit cait_xxs24_224 coat_lite_tiny test_coatnet test_maxvit deit_tiny_patch16_224 efficientformerv2_s0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224
levit_128s gmlp_ti16_224 resmlp_12_224 pit_ti_224 pit_ti_distilled_224 sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 visformer_tiny
vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224 tnt_s_legacy_patch16_224 twins_svt_small
'''.split()
SIZES = {'efficientvim_m1': (160, 224), 'shvit_s1': (128, 192), 'efficientvit_m0': (128, 192), 'levit_128s': (128, 192), 'test_maxvit': (128, 160), 'eva02_tiny_patch14_224': (84, 112), 'mobilevitv2_050': (128, 192), 'xcit_nano_12_p8_224': (64, 96)}
SHALLOW = {'cait_xxs24_224': dict(depth=3), 'convit_tiny': dict(depth=3, local_up_to_layer=2), 'vit_tiny_patch16_dinov3_qkvb': dict(depth=3), 'eva02_tiny_patch14_224': dict(depth=3), 'hiera_tiny_224': dict(stages=(1, 1, 1, 1)),
           'sequencer2d_s': dict(layers=(1, 1, 1, 1)), 'swin_tiny_patch4_window7_224': dict(depths=(1, 1, 1, 1)), 'swinv2_tiny_window8_256': dict(depths=(1, 1, 1, 1)),
           'swinv2_cr_tiny_224': dict(depths=(1, 1, 1, 1)), 'xcit_nano_12_p8_224': dict(depth=3), 'tnt_s_legacy_patch16_224': dict(depth=3), 'twins_svt_small': dict(depths=(1, 1, 1, 1)),
           'davit_tiny': dict(depths=(1, 1, 1, 1))} # fewer blocks, each of them as it is
SQUARE = dict(convit_tiny=(224, 224), crossvit_tiny_240=(240, 240))

def is_right(found, size):
    assert found['status']=='works', found
    rows, columns = found['grid']
    assert abs(rows*size[1]/size[0] - columns) <= 1, found


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name):
    size, options = TORCHVISION[name]
    build = TORCHVISION_SHALLOW.get(name, lambda: torchvision.models.get_model(name, weights=None, num_classes=5, **options))
    is_right(check(name, build, size), size)


def test_every_module_of_torchvision_is_here():
    assert {torchvision_family(name) for name in TORCHVISION}=={torchvision_family(name) for name in torchvision_names()}


@pytest.mark.parametrize('name', ANY_SIZE + MADE_FOR_A_SIZE + [*SQUARE])
def test_timm(name):
    size = SQUARE.get(name) or SIZES.get(name, SMALL)
    options = {**(dict(img_size=size) if name in MADE_FOR_A_SIZE else {}), **SHALLOW.get(name, {})}
    is_right(check(name, lambda: timm.create_model(name, pretrained=False, num_classes=5, **options), size), size)


@pytest.mark.parametrize('name', ['test_resnet', 'convnext_atto'])
def test_what_fastai_makes_of_timm(name):
    from fastai.vision.all import vision_learner
    found = check(name, lambda: vision_learner(small_dls(SMALL), name, pretrained=False).model.cpu(), SMALL)
    is_right(found, SMALL)
    assert found['layer']=='0'


# -- LeGrad's blocks

OF_BLOCKS = dict( # one of each way to attend to all places; how many blocks there are
    vit_tiny_patch16_224=(3, dict(depth=3)), vit_so150m_patch16_reg4_map_256=(3, dict(depth=3, embed_dim=72, num_heads=3)),
    vit_small_patch16_18x2_224=(2, dict(depth=2, embed_dim=72, num_heads=3)), vit_dwee_patch16_reg1_gap_256=(3, dict(depth=3)), deit_tiny_distilled_patch16_224=(3, dict(depth=3)),
    vit_small_patch16_dinov3=(3, dict(depth=3, embed_dim=96, num_heads=3)), cait_xxs24_224=(3, dict(depth=3)),
    swin_tiny_patch4_window7_224=(2, dict(depths=(1, 1, 2, 2))), test_coatnet=(1, {}), naflexvit_base_patch16_gap=(3, dict(depth=3, embed_dim=72, num_heads=3)))

@pytest.mark.parametrize('name', OF_BLOCKS)
def test_legrad_responds_where_the_image_was_disturbed(name):
    n_blocks, options = OF_BLOCKS[name]
    model = enliven(timm.create_model(name, pretrained=False, num_classes=5, **(options if name.startswith('naflex') else dict(options, img_size=SMALL))), 4, SMALL)
    x = pictures(1, SMALL)
    with Probe(model) as probe: assert len(probe(x).blocks())==n_blocks
    assert legrad_quadrants(model, x)=='4 of 4'


@pytest.mark.parametrize('name,options,verdict', [
    ('xcit_nano_12_p16_224', dict(depth=3, img_size=SMALL), ''), ('test_convnext', {}, ''), ('crossvit_tiny_240', {}, 'refused: the blocks of this CrossVit could not be told')])
def test_what_has_no_blocks_that_say_something(name, options, verdict):
    size = SQUARE.get(name, SMALL)
    model = enliven(timm.create_model(name, pretrained=False, num_classes=5, **options), 4, size)
    assert legrad_quadrants(model, pictures(1, size)).startswith(verdict) and bool(legrad_quadrants(model, pictures(1, size)))==bool(verdict)


def test_branches_that_begin_at_zero():
    "Before training, the norms that end the branches of a Swin v2 are zero, and LeGrad's map is empty; the check gives them the weights of others"
    model = timm.create_model('swinv2_tiny_window8_256', pretrained=False, num_classes=5, depths=(1, 1, 1, 1), img_size=SMALL).eval()
    x = pictures(1, SMALL)
    assert legrad_quadrants(model, x)=='empty' and legrad_quadrants(enliven(model, 4, SMALL), x)=='4 of 4'


# -- the check can fail

def small_vit(name='vit_tiny_patch16_224', size=SMALL, **options):
    return timm.create_model(name, pretrained=False, num_classes=5, **{**dict(embed_dim=72, depth=8, num_heads=3), **options}, **({} if 'dynamic_img_size' in options else dict(img_size=size)))


def reordered_vit(order, size):
    "Its tokens are in another order than the places: `order`"
    model = small_vit(size=size)
    model.patch_embed.register_forward_hook(lambda module, inputs, tokens: tokens[:, order])
    return model


def orders(rows, columns):
    places = torch.arange(rows*columns)
    return dict(as_they_are=places, by_columns=places.view(rows, columns).T.flatten(), backwards=places.flip(0), shuffled=torch.randperm(rows*columns, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize('size', [(96, 128), (96, 96)])
@pytest.mark.parametrize('order', ['as_they_are', 'by_columns', 'backwards', 'shuffled'])
def test_a_layout_that_is_wrong_is_seen(order, size):
    found = check('reordered', lambda: reordered_vit(orders(size[0]//16, size[1]//16)[order], size), size)
    if order=='as_they_are': assert found['status']=='works'
    else: assert found['status']=='refused' or found['hits'] < 4 and found['status'] in ('wrong', 'ambiguous'), found
    if order=='backwards': assert found['hits'] in (0, None)


def test_height_and_width_exchanged_is_seen(monkeypatch):
    "The model is as it should be, the layout is read the wrong way round"
    spatial = Layout.spatial
    def exchanged(layout, out): return out[..., layout.n_extra:, :].movedim(-1, -2).unflatten(-1, layout.grid[::-1]).transpose(-1, -2) if layout.kind=='tokens' else spatial(layout, out)
    build = lambda: small_vit(size=(96, 160))
    assert check('right', build, (96, 160))['hits']==4
    monkeypatch.setattr(Layout, 'spatial', exchanged)
    found = check('wrong', build, (96, 160))
    assert found['status']=='refused' or found['hits'] < 4


# -- tokens

@pytest.mark.parametrize('size,options,grid', [((100, 150), dict(dynamic_img_size=True, dynamic_img_pad=True), (7, 10)), ((100, 150), {}, (6, 9)), ((90, 130), dict(dynamic_img_size=True, dynamic_img_pad=True), (6, 9))])
def test_patches_that_do_not_divide_the_image(size, options, grid):
    found = check('vit', lambda: small_vit(size=size, **options), size)
    is_right(found, size)
    assert found['grid']==grid


@pytest.mark.parametrize('name,size,layout', [
    ('vit_small_patch14_reg4_dinov2', (84, 112), 'tokens, 6 × 8 after 5 others'), ('vit_wee_patch16_reg1_gap_256', SMALL, 'tokens, 6 × 8 after 1 other'),
    ('deit_tiny_distilled_patch16_224', SMALL, 'tokens, 6 × 8 after 2 others'), ('vit_base_patch16_siglip_224', SMALL, 'tokens, 6 × 8'), ('vit_base_patch16_clip_224', SMALL, 'tokens, 6 × 8 after 1 other'),
    ('vit_so150m_patch16_reg4_map_256', SMALL, 'tokens, 6 × 8 after 4 others')])
def test_tokens_that_are_no_places(name, size, layout):
    found = check(name, lambda: small_vit(name, size), size)
    is_right(found, size)
    assert found['layout']==layout


@pytest.mark.parametrize('name,size,options', [('vit_base_patch16_siglip_224', SMALL, dict(embed_dim=48)), ('vit_so150m_patch16_reg4_map_256', SMALL, dict(embed_dim=48)),
                                               ('vit_tiny_patch16_224', SMALL, dict(embed_dim=48)), ('xcit_nano_12_p16_224', SMALL, dict(embed_dim=48, num_heads=4, depth=4))])
def test_a_vector_with_as_many_numbers_as_there_are_places(name, size, options):
    "`[B, 1, 48]` is what is pooled from 48 places, not a map of one channel; with real sizes, a SigLIP of width 768 on an image of 24 × 32 patches"
    found = check(name, lambda: timm.create_model(name, pretrained=False, num_classes=5, img_size=size, **{**dict(depth=4, num_heads=3), **options}), size)
    is_right(found, size)
    assert found['channels']==48 and found['layout'].startswith('tokens, 6 × 8')


def test_two_tokens_are_no_grid():
    "Class and distillation token go on alone, `[B, 2, C]`: no halving of 6 × 8 makes 1 × 2 places of them"
    for size in (SMALL, (224, 288)):
        assert check('pit', lambda: timm.create_model('pit_ti_distilled_224', pretrained=False, num_classes=5, img_size=size), size)['layout'].endswith('after 2 others')


# -- a layer that is named

def small_swin(): return timm.create_model('swin_tiny_patch4_window7_224', pretrained=False, num_classes=5, img_size=(128, 192), window_size=4, embed_dim=24, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4))


@pytest.mark.parametrize('build,size,layer,layout', [
    (small_vit, SMALL, 'blocks.5', 'tokens, 6 × 8 after 1 other'), (small_vit, SMALL, 'blocks.0.attn', 'tokens, 6 × 8 after 1 other'), (small_vit, SMALL, 'blocks.2.mlp.fc1', 'tokens, 6 × 8 after 1 other'),
    (small_vit, SMALL, 'patch_embed', 'tokens, 6 × 8'), (small_vit, SMALL, 'patch_embed.proj', 'channels first, 6 × 8'),
    (small_swin, (128, 192), 'layers.0', 'channels last, 32 × 48'), (small_swin, (128, 192), 'layers.1', 'channels last, 16 × 24'), (small_swin, (128, 192), 'layers.2.blocks.1', 'channels last, 8 × 12'),
    (small_swin, (128, 192), 'layers.3.downsample', 'channels last, 4 × 6')])
def test_a_layer_that_is_named(build, size, layer, layout):
    found = check(layer, build, size, layer=layer)
    is_right(found, size)
    assert found['layout']==layout


def test_every_stage_of_a_swin():
    with Probe(small_swin(), 'stages') as probe: cap = probe(pictures(1, (128, 192)))
    assert [str(layout) for layout in cap.layouts]==['channels last, 32 × 48', 'channels last, 16 × 24', 'channels last, 8 × 12', 'channels last, 4 × 6']


WINDOWS = pytest.mark.xfail(strict=True, reason='Hiera keeps the tokens of its first stages in the order of its windows, which the number of tokens does not show')

@pytest.mark.parametrize('layer', [pytest.param('blocks.0', marks=WINDOWS), 'blocks.1'])
def test_tokens_in_the_order_of_windows(layer):
    "Refused or read rightly, but not as rows of the image"
    found = check('hiera', lambda: timm.create_model('hiera_tiny_224', pretrained=False, num_classes=5, img_size=SMALL, **SHALLOW['hiera_tiny_224']), SMALL, layer=layer)
    assert found['status'] in ('refused', 'works')


def small_maxvit(): return timm.create_model('test_maxvit', pretrained=False, num_classes=5, img_size=(128, 192))


@pytest.mark.parametrize('build,layer', [(small_swin, 'layers.0.blocks.0.attn'), (small_swin, 'layers.0.blocks.1.attn.proj'), (small_swin, 'layers.1.blocks.1.attn.qkv'),
                                         (small_maxvit, 'stages.0.blocks.0.attn_block.attn'), (small_maxvit, 'stages.1.blocks.0.attn_grid.attn.qkv')])
def test_windows_are_refused(build, layer):
    "Inside a window attention there are rows of windows, not of items"
    with Probe(build(), layer) as probe:
        with pytest.raises(ValueError, match='rows for 2 items.*name another layer|is not spatial'): probe(pictures(2, (128, 192)))


@pytest.mark.parametrize('layer', ['blocks.3.attn.q_norm', 'blocks.3.attn.k_norm'])
@pytest.mark.parametrize('heads,width', [(1, 64), (3, 192), (6, 48), (4, 256)])
def test_heads_of_an_attention_are_no_places(layer, heads, width):
    "`[B, heads, tokens, channels]`: 49 tokens and 64 channels even have the proportions of the image"
    build = lambda: small_vit(embed_dim=width, num_heads=heads, qk_norm=True)
    with Probe(build(), layer) as probe:
        with pytest.raises(ValueError, match='is not spatial'): probe(pictures(1, SMALL))
    assert not [seen.name for seen in LayerScan(build(), (pictures(1, SMALL),), {}).spatial if '_norm' in seen.name]
    is_right(check('vit', build, SMALL), SMALL)
