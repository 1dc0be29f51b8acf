"`learn.explain`: the maps, predictions and losses of `get_cams`, shard by shard, and nothing lost whatever happens."
import errno

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from fastai.vision.all import BCEWithLogitsLossFlat, Callback, DataBlock, DataLoaders, ImageBlock, Learner, MaskBlock, MultiCategoryBlock, RegressionBlock, Resize, TfmdDL, get_image_files, load_learner

from fastai_cam.all import CAMStore
from helpers.compare import Draws, codes_of, learner_of
from helpers.tables import assert_left_as_it_was, contents, learner, net, state_of


@pytest.fixture
def learn(dls): return learner(dls)


def assert_same_maps(store, cams):
    maps = store.maps().numpy()
    assert maps.shape==tuple(cams.maps.shape)
    peak = np.abs(cams.maps.numpy()).reshape(len(maps), -1).max(1).reshape(-1, *[1]*(maps.ndim - 1))
    assert (peak > 0).all() and (np.abs(maps - cams.maps.numpy()) <= 6e-4*peak).all()


@pytest.mark.parametrize('asked', [dict(), dict(method='gradcam'), dict(cls='left'), dict(cls=['predicted', 'actual']), dict(method=['gradcam', 'cam'], cls='actual'), dict(layer='0.2', method='layercam'),
                                   dict(cls=lambda out: out[:, 0] - out[:, 1])], ids=lambda asked: ', '.join(f'{name} {value if not callable(value) else "function"}' for name, value in asked.items())) # the address of a function is another in each process
def test_it_is_what_get_cams_gives(learn, dls, tmp_path, asked):
    store, cams = learn.explain(dls.valid, tmp_path/'cams', shard=5, **asked), learn.get_cams(dls.valid, **asked)
    assert_same_maps(store, cams)
    frame = store.to_pandas()
    assert frame['item'].tolist()==list(map(str, cams.items)) and frame['index'].tolist()==list(range(12)) and frame['error'].isna().all()
    assert frame['prediction'].tolist()==[dls.vocab[c] for c in cams.preds.argmax(1)] and frame['label'].tolist()==[dls.vocab[c] for c in cams.targs]
    assert np.allclose(frame['loss'], cams.losses, atol=1e-5) and np.allclose(frame['probability'], cams.preds.max(1).values, atol=1e-6)
    assert np.stack(frame['class_index']).tolist()==cams.classes.tolist()


def test_one_pass_gives_everything(learn, dls, tmp_path):
    n = []
    hook = learn.model[0][0].register_forward_hook(lambda module, inputs, out: n.append(len(out)))
    learn.explain(dls.valid, tmp_path/'cams', shard=6, method='gradcam')
    hook.remove()
    assert n==[1, 5, 1, 5, 1] # the first item by itself, to see what it is about; then each shard in its own batches


@pytest.mark.parametrize('bs, shard', [(2, 5), (5, 5), (64, 5), (3, 4096)])
def test_a_shard_that_is_made_again_is_the_same_to_the_last_byte(learn, dls, tmp_path, bs, shard):
    whole = learn.explain(dls.valid, tmp_path/'cams', shard=shard, bs=bs, method='gradcam')
    before = contents(tmp_path/'cams')
    assert len(before)==1 + -(-12//shard)
    for file in whole.files:
        file.unlink()
        again = learn.explain(dls.valid, tmp_path/'cams', shard=shard, method='gradcam') # `bs` is known to the folder
        assert again.is_complete and contents(tmp_path/'cams')==before


def test_what_is_finished_is_not_computed_again(learn, dls, tmp_path):
    store = learn.explain(dls.valid, tmp_path/'cams', shard=4, method='gradcam')
    n = []
    hook = learn.model[0][0].register_forward_hook(lambda module, inputs, out: n.append(len(out)))
    learn.explain(dls.valid, tmp_path/'cams', shard=4, method='gradcam')
    assert n==[]
    store.files[1].unlink()
    learn.explain(dls.valid, tmp_path/'cams', shard=4, method='gradcam')
    hook.remove()
    assert n==[4]


def test_any_number_of_processes_make_the_same(learn, dls, tmp_path, monkeypatch):
    learn.explain(dls.valid, tmp_path/'one', shard=3, method='gradcam')
    for world in (2, 7):
        for rank in reversed(range(world)):
            monkeypatch.setenv('RANK', str(rank)); monkeypatch.setenv('WORLD_SIZE', str(world))
            store = learn.explain(dls.valid, tmp_path/str(world), shard=3, method='gradcam')
            assert store.n_missing==max(0, 4 - len([k for k in range(4) if k % world >= rank])) # those of the processes that have not run yet
        assert contents(tmp_path/str(world))==contents(tmp_path/'one')


def test_unreadable_files_are_rows(learn, pictures, tmp_path):
    files, cut = sorted(get_image_files(pictures))[:6], tmp_path/'cut.png'
    cut.write_bytes(files[0].read_bytes()[:1000])
    names = [tmp_path/'no.png', *files[:3], cut, *files[3:]]
    with pytest.warns(UserWarning, match="2 items have an error instead of a map .*no.png.*cut.png.*`errors` of the table lists them"): store = learn.explain(names, tmp_path/'cams', shard=4, method='gradcam')
    assert store.errors['index'].tolist()==[0, 4] and store.errors['item'].tolist()==[str(names[0]), str(cut)] and 'No such file' in store.errors['error'][0] and 'truncated' in store.errors['error'][1]
    assert_same_maps(store.where('index >= 0'), learn.get_cams(files, method='gradcam'))
    frame = store.to_pandas()
    assert frame.loc[[0, 4], 'prediction'].isna().all() and frame['prediction'].notna().sum()==6
    with pytest.raises(ValueError, match=r'item 0 \(.*no.png.*\) has no map: FileNotFoundError'): store[0]


def test_the_strict_stop_at_the_first(learn, pictures, tmp_path):
    files, before = sorted(get_image_files(pictures))[:6], state_of(learn)
    with pytest.raises(ValueError, match=r"item 5 \('no.png'\) cannot be read: FileNotFoundError"): learn.explain([*files[:5], 'no.png'], tmp_path/'cams', shard=2, method='gradcam', on_error='raise', bs=2)
    assert_left_as_it_was(learn, before)
    assert CAMStore.open(tmp_path/'cams').n_missing==1 # those before it are there


class Fails(Exception): pass


@pytest.mark.parametrize('what', ['method', 'disk', 'interrupt', 'callback'])
def test_whatever_happens_finished_shards_stay_and_the_learner_is_as_it_was(learn, dls, tmp_path, monkeypatch, what):
    expected = learn.explain(dls.valid, tmp_path/'whole', shard=3, method='gradcam') and contents(tmp_path/'whole')
    before, n = state_of(learn), []
    def counted(*args):
        n.append(1)
        return len(n)
    if what=='disk':
        from fastai_cam.data import explain
        real = explain.write_whole
        def full(file, content):
            if counted() > 2: monkeypatch.setattr('fastai_cam.files.os.fsync', lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'full')))
            real(file, content)
        monkeypatch.setattr(explain, 'write_whole', full)
        error, kwargs = OSError, {}
    if what=='callback':
        class Breaks(Callback):
            def after_pred(self):
                if counted() > 5: raise Fails('broken')
        learn.add_cb(Breaks())
        before, error = state_of(learn), Fails
    if what in ('method', 'interrupt'):
        from fastai_cam.methods.registry import METHODS
        error, real_method = dict(method=Fails, interrupt=KeyboardInterrupt)[what], METHODS['gradcam']
        def breaks(cap, scores):
            if counted() > 5: raise error
            return real_method(cap, scores)
        breaks.__name__, breaks.facts, breaks.__module__ = 'gradcam', real_method.facts, 'fastai_cam.methods.catalogue'
        monkeypatch.setitem(METHODS, 'gradcam', breaks)
    with pytest.raises(error) as e: learn.explain(dls.valid, tmp_path/'cams', shard=3, method='gradcam', bs=2)
    assert what != 'disk' or 'there is no room left' in str(e.value)
    assert_left_as_it_was(learn, before)
    monkeypatch.undo()
    found = contents(tmp_path/'cams')
    assert len(found)==3 and not [name for name in found if name.startswith('.')] # two shards, and the manifest
    if what=='callback': learn.remove_cb(learn.breaks)
    learn.explain(dls.valid, tmp_path/'cams', shard=3, method='gradcam')
    learn.explain(dls.valid, tmp_path/'again', shard=3, method='gradcam', bs=2)
    assert contents(tmp_path/'cams')==contents(tmp_path/'again') and set(expected)==set(contents(tmp_path/'cams'))


def test_another_run_is_refused_before_any_work(learn, dls, tmp_path):
    learn.explain(dls.valid, tmp_path/'cams', shard=4, method='gradcam')
    before, n = contents(tmp_path/'cams'), []
    hook = learn.model[0][0].register_forward_hook(lambda module, inputs, out: n.append(len(out)))
    same = dict(source=dls.valid, shard=4, method='gradcam')
    other = learner(dls)
    with torch.no_grad(): other.model[1][-1].bias[0] += 1e-3
    for asked, words in ((dict(method='cam'), r'a method: \["gradcam"\] there, \["cam"\] now'), (dict(cls='left'), 'a question'), (dict(source=list(range(11))), 'a list of items; a number of items: 12 there, 11 now'),
                         (dict(source=list(range(11, -1, -1))), r'a list of items: the same ones in another order \(sort them, both times\)\.'), (dict(shard=5), 'a shard size'), (dict(layer='0.2'), 'a layer'), (dict(boxes=True), 'a choice of boxes')):
        with pytest.raises(ValueError, match=f'What differs: {words}'): learn.explain(to=tmp_path/'cams', **(same | asked))
    with pytest.raises(ValueError, match='What differs: a model'): other.explain(to=tmp_path/'cams', **same)
    hook.remove()
    assert n==[] and contents(tmp_path/'cams')==before


def test_transforms_count(pictures, dls, tmp_path):
    def of(size): return learner(DataBlock((ImageBlock,), get_items=get_image_files, item_tfms=Resize(size)).dataloaders(pictures, bs=5, num_workers=0), loss_func=nn.CrossEntropyLoss())
    files = sorted(get_image_files(pictures))[:4]
    of(48).explain(files, tmp_path/'cams', cls=0, method='gradcam')
    with pytest.raises(ValueError, match='What differs: transforms'): of(32).explain(files, tmp_path/'cams', cls=0, method='gradcam')


def test_a_folder_is_its_pictures_in_order(learn, pictures, tmp_path):
    "The same table as of the sorted files, whose run can be gone on with by either"
    (pictures/'left/notes.txt').touch()
    for given in (pictures, str(pictures), sorted(get_image_files(pictures))): store = learn.explain(given, tmp_path/'cams', method='gradcam', shard=9)
    assert store.to_pandas()['item'].tolist()==[str(file) for file in sorted(get_image_files(pictures))]
    with pytest.raises(ValueError, match='a list of items: the same ones in another order'): learn.explain(sorted(get_image_files(pictures))[::-1], tmp_path/'cams', method='gradcam', shard=9)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match="there are no pictures in the folder '.*empty'"): learn.explain(tmp_path/'empty', tmp_path/'none')
    assert not (tmp_path/'none').exists()


def test_what_makes_no_sense_is_said_first(learn, tmp_path):
    (tmp_path/'file').write_text('')
    for asked, error, words in ((dict(shard=0), ValueError, 'shard=0 holds no items'), (dict(bs=0), ValueError, 'bs=0 makes no batches'), (dict(on_error='skip'), ValueError, "'record' .* or 'raise', not 'skip'"),
                                (dict(cls='zebra'), ValueError, 'zebra'), (dict(method='gradcamm'), ValueError, "did you mean 'gradcam'"), (dict(layer='9'), ValueError, '9'),
                                (dict(cls='actual', source=['a.png']), ValueError, "cls='actual' needs labels"), (dict(to=tmp_path/'file'), NotADirectoryError, 'is a file, and the table is a folder')):
        with pytest.raises(error, match=words): learn.explain(**(dict(source=None, to=tmp_path/'cams') | asked))
    (tmp_path/'empty').mkdir()
    (tmp_path/'no.png').write_text('')
    for source, words in ((tmp_path/'empty', 'there are no pictures in the folder'), (tmp_path/'nodata', 'there is no file or folder'), ([tmp_path/'no.png'], 'none of the 1 items can be read')):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught: learn.explain(source, tmp_path/'cams')
        assert 'Errno' not in str(caught.value)
    assert not (tmp_path/'cams').exists()


def test_maps_that_are_no_numbers_are_errors(learn, dls, tmp_path):
    @torch.no_grad()
    def poison(module, inputs, out): return torch.where(torch.arange(len(out))[:, None, None, None]==1, torch.nan, out)
    hook = learn.model[0][-1].register_forward_hook(poison)
    with pytest.warns(UserWarning, match='have an error instead of a map'): store = learn.explain(dls.valid, tmp_path/'cams', shard=4, bs=4, method='gradcam')
    with pytest.raises(ValueError, match=r'item 1 \(.*\) has no map: the map, or the output that it explains, is not finite'): learn.explain(dls.valid, tmp_path/'strict', shard=4, bs=4, method='gradcam', on_error='raise')
    hook.remove()
    assert store.errors['index'].tolist()==[1, 5, 9] and set(store.errors['error'])=={'the map, or the output that it explains, is not finite'}


def test_boxes(learn, dls, tmp_path):
    store, cams = learn.explain(dls.valid, tmp_path/'cams', boxes=True, method='gradcam'), learn.get_cams(dls.valid, method='gradcam')
    found = [[tuple(box) for box in boxes] for boxes in store.to_pandas()['boxes']]
    assert found==[[tuple(box)[:4] for box in boxes] for boxes in cams.boxes()] and any(found)


# -- other tasks

def test_several_labels(pictures, tmp_path):
    data = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, get_y=lambda file: [file.parent.name, 'picture'], item_tfms=Resize(64)).dataloaders(pictures, bs=5, num_workers=0)
    learn = Learner(data, net(3), loss_func=BCEWithLogitsLossFlat())
    with learn.no_bar(): store, cams = learn.explain(data.valid, tmp_path/'cams', method='gradcam'), learn.get_cams(data.valid, method='gradcam')
    back = store.to_cams()
    n = cams.maps.shape[1] # `get_cams` leaves out the questions that nobody was asked; a table has a place for each that could be
    assert (store.maps()[:, :n] - cams.maps).abs().max() <= 6e-4*cams.maps.abs().max() and (store.maps()[:, n:]==0).all()
    assert store.to_pandas()['label'].tolist()==[';'.join(sorted(['picture', file.parent.name])) for file in cams.items]
    assert [back.title(i) for i in range(len(back))]==[cams.title(i) for i in range(len(cams))]


def test_numbers(pictures, tmp_path):
    data = DataBlock((ImageBlock, RegressionBlock(2)), get_items=get_image_files, get_y=lambda file: [float(file.stem), 1.], item_tfms=Resize(64)).dataloaders(pictures, bs=5, num_workers=0)
    learn = Learner(data, net(2), loss_func=nn.MSELoss())
    with learn.no_bar(): store, cams = learn.explain(data.valid, tmp_path/'cams', method='gradcam'), learn.get_cams(data.valid, method='gradcam')
    assert_same_maps(store, cams)
    assert store.to_pandas()['label'].map(list).tolist()==[[float(file.stem), 1.] for file in cams.items]
    assert [store.to_cams().title(i, 1) for i in range(3)]==[cams.title(i, 1) for i in range(3)]


def test_masks(tmp_path):
    learn = learner_of(ImageBlock, MaskBlock(['nothing', 'marker', 'pink marker']), get_y=codes_of, model=Draws())
    store, cams = learn.explain(learn.dls.valid, tmp_path/'cams', method='gradcam'), learn.get_cams(learn.dls.valid, method='gradcam')
    assert_same_maps(store, cams)
    frame = store.to_pandas()
    assert frame['item'].tolist()==[str(i) for i in range(8, 15)] and frame['explains'].tolist()==[cams.vocab[c] for c in cams.classes] and np.allclose(frame['loss'], cams.losses, atol=1e-5)


def test_data_of_ones_own(tmp_path):
    samples = [(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), i%2) for i in range(10)]
    learn = learner(DataLoaders(*[TfmdDL(samples, bs=4, num_workers=0) for _ in range(2)]), loss_func=nn.CrossEntropyLoss())
    store = learn.explain(None, tmp_path/'cams', shard=7, method='gradcam')
    assert_same_maps(store, learn.get_cams(learn.dls.valid, method='gradcam'))
    assert store.to_pandas()['prediction'].tolist()==[f'class {c}' for c in learn.get_cams(learn.dls.valid, method='gradcam').preds.argmax(1)]


def test_a_model_without_a_method_of_its_own_name(learn, dls, tmp_path):
    "A function of the user's own counts with its code"
    def mine(cap, scores): return cap.acts[-1].mean(1)[:, None].expand(*scores.shape, -1, -1)
    learn.explain(dls.valid, tmp_path/'cams', method=mine)
    def mine(cap, scores): return cap.acts[-1].amax(1)[:, None].expand(*scores.shape, -1, -1)
    with pytest.raises(ValueError, match='What differs: a method'): learn.explain(dls.valid, tmp_path/'cams', method=mine)


def test_random_methods_draw_the_same_again(learn, dls, tmp_path):
    def drawn(cap, scores): return torch.rand(*scores.shape, 4, 4)
    store = learn.explain(dls.valid, tmp_path/'cams', shard=4, method=drawn)
    before = contents(tmp_path/'cams')
    store.files[2].unlink()
    torch.manual_seed(77)
    learn.explain(dls.valid, tmp_path/'cams', shard=4, method=drawn)
    assert contents(tmp_path/'cams')==before


class Staged(nn.Module):
    "A layer with a name that means something else, too"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.Sequential(*[nn.Sequential(nn.Conv2d(3 if not i else 6, 6, 3, 2, 1), nn.ReLU()) for i in range(3)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    def forward(self, x): return self.head(self.stages(x))


@pytest.mark.parametrize('method', ['gradcam', 'objectcam', 'layercam+stages'])
def test_layers_that_were_found_are_the_same_for_all_shards(dls, tmp_path, method):
    learn = Learner(dls, Staged())
    with learn.no_bar(): store, cams = learn.explain(dls.valid, tmp_path/'cams', shard=5, method=method), learn.get_cams(dls.valid, method=method)
    assert store.manifest['found']['layers']==cams.layers and ('stages' in cams.layers or method != 'gradcam')
    assert_same_maps(store, cams)


def test_maps_of_different_sizes_are_refused(pictures, tmp_path):
    data = DataBlock((ImageBlock,), get_items=get_image_files).dataloaders(pictures, bs=1, num_workers=0)
    files = sorted(get_image_files(pictures))[:3]
    for i, size in enumerate([(64, 64), (96, 64)]): Image.new('RGB', size).save(tmp_path/f'{i}.png')
    for names in ([tmp_path/'0.png', tmp_path/'1.png'], [*files, tmp_path/'1.png']):
        with pytest.raises(ValueError, match='of different (sizes|shapes) .*: add Resize to item_tfms so that all images have one size'): learner(data, loss_func=nn.CrossEntropyLoss()).explain(names, tmp_path/str(len(names)), shard=2, bs=1, cls=0, method='gradcam')


def test_a_learner_that_was_exported_and_loaded(learn, dls, pictures, tmp_path):
    learn.export(tmp_path/'export.pkl')
    loaded, files = load_learner(tmp_path/'export.pkl'), sorted(get_image_files(pictures))[:5]
    with loaded.no_bar(): store = loaded.explain(list(map(str, files)), tmp_path/'cams', shard=3, method='gradcam')
    assert_same_maps(store, learn.get_cams(files, method='gradcam'))


def test_progress_is_shown_where_the_learner_shows_it(dls, tmp_path, capsys):
    Learner(dls, net()).explain(dls.valid, tmp_path/'cams', shard=5, bs=2, method='gradcam')
    assert '100.00%' in capsys.readouterr().out
    learner(dls).explain(dls.valid, tmp_path/'again', shard=5, method='gradcam')
    assert capsys.readouterr().out==''


@pytest.mark.slow
def test_worker_processes_of_the_loader_change_nothing(learn, dls, pictures, tmp_path):
    cut, files = tmp_path/'cut.png', sorted(get_image_files(pictures))
    cut.write_bytes(files[0].read_bytes()[:1000])
    names = [*files[:7], cut, *files[7:], tmp_path/'no.png']
    for workers in (0, 2):
        with pytest.warns(UserWarning, match='2 items have an error'): learn.explain(dls.test_dl(names, num_workers=workers), tmp_path/str(workers), shard=5, bs=2, method='gradcam')
    assert contents(tmp_path/'0')==contents(tmp_path/'2') and CAMStore.open(tmp_path/'2').errors['index'].tolist()==[7, 25]
