"The project as it is handed on: generated files in sync, nothing private in it, and a wheel that stands by itself."
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import venv
from configparser import ConfigParser
from importlib.metadata import distribution, PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import config
import figures
import llms
from readme import render

WIDE_LINES, LARGE_CELLS, LONG_PARTS, RIDDLES, MOST_LINES = 0, 0, 0, 0, 490 # lines over 140 characters, export cells over 40 lines, functions over 30 and classes over 150 lines, expressions to be read twice, lines of a room
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ['core', 'files', 'checks', 'conditions', 'probe.layout', 'probe.guard', 'probe.layers', 'probe.evidence', 'probe.reasons', 'probe.modes',
         'probe.readings', 'probe.scan', 'probe.finder', 'probe.blocks', 'probe.biases', 'probe.rerun', 'probe.capture', 'probe.watch', 'captions', 'tasks',
         'targets.kinds', 'targets.prompt', 'targets.lookup', 'methods.combine', 'methods.registry', 'methods.catalogue',
         'methods.masking', 'methods.attention', 'methods.evidence', 'methods.baselines', 'methods.table', 'maps.words', 'maps.pixels',
         'maps.style', 'maps.colours', 'maps.layout', 'maps.original', 'maps.draw', 'maps.boxes', 'maps.cams', 'maps.titles', 'maps.grid',
         'maps.export', 'maps.table', 'maps.store', 'state',
         'source.passes', 'source.loaders', 'source.images', 'source.items', 'learner.task', 'learner.arguments', 'learner.query',
         'learner.cams', 'learner.layers', 'interpret.answers', 'interpret.base', 'interpret.selection', 'interpret.page',
         'interpret.losses', 'interpret.views', 'interpret.inside', 'interpret.concepts', 'trust.rescore', 'trust.impute', 'trust.cost',
         'trust.metrics', 'trust.masks', 'trust.similarity', 'trust.randomize', 'trust.sanity', 'trust.compare', 'trust.places', 'trust.verdict',
         'trust.survey', 'shortcuts.edits', 'shortcuts.evidence',
         'shortcuts.matching', 'shortcuts.candidates', 'shortcuts.testing', 'shortcuts.report', 'data.fingerprint', 'data.shards', 'data.schema',
         'data.items', 'data.store', 'data.explain', 'data.frames',
         'similar.features', 'similar.index', 'similar.matches', 'similar.show',
         'reasons.groups', 'reasons.effects', 'reasons.atlas',
         'report.facts', 'report.check', 'report.answers', 'report.pictures', 'report.page', 'report.like', 'report.write',
         'explore.marks', 'explore.widget', 'explore.show',
         'cli.words', 'cli.photos', 'cli.results', 'cli.models', 'cli.explain', 'cli.ask', 'cli.shell', '__main__']


def run(*command, cwd): return subprocess.run([str(part) for part in command], cwd=cwd, check=True, capture_output=True, text=True).stdout
def tracked(): return [ROOT/name for name in run('git', 'ls-files', cwd=ROOT).splitlines()] if (ROOT/'.git').exists() else [f for f in ROOT.rglob('*') if f.is_file() and '.venv' not in f.parts]
def settings():
    parser = ConfigParser(); parser.read(ROOT/'settings.ini')
    return parser['DEFAULT']


def test_pyproject_is_what_settings_ini_says(tmp_path):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    (tmp_path/'fastai_cam').mkdir()
    config.write(tmp_path)
    assert (tmp_path/'pyproject.toml').read_text()==(ROOT/'pyproject.toml').read_text(), 'run: make config'
    import fastai_cam
    assert fastai_cam.__version__==settings()['version']


def test_every_extra_is_in_pyproject():
    section = (ROOT/'pyproject.toml').read_text().split('[project.optional-dependencies]\n')[1].split('\n\n')[0]
    generated = {name: ast.literal_eval(packages) for name, _, packages in (line.partition(' = ') for line in section.splitlines())}
    named = {key.removesuffix('_requirements') for key in settings() if key.endswith('_requirements')} - {'pip'}
    assert set(generated)==named
    for name in named: assert generated[name]==settings()[f'{name}_requirements'].split(), name


def test_readme_is_what_the_index_notebook_says():
    for name, content in render().items():
        assert (ROOT/name).read_bytes()==content, f'{name} is out of date: run make readme'


def test_the_table_of_methods_in_readme_is_the_registry():
    from fastai_cam.methods import methods_table
    assert methods_table() in (ROOT/'README.md').read_text(), 'put the output of methods_table() into nbs/index.ipynb, then: make readme'


def test_four_requirements_and_no_more():
    assert {Requirement(r).name for r in settings()['requirements'].split()}=={'fastai', 'torch', 'matplotlib', 'fastcore'}


def imports_of(room):
    "The rooms and packages that a room imports, and the names that it takes from there"
    file = ROOT/f'fastai_cam/{room.replace(".", "/")}.py'
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level: continue
        base = room.split('.')[:-node.level] # one dot is the room's own package
        yield '.'.join([*base, *(node.module or '').split('.')]).strip('.'), [alias.name for alias in node.names]


def test_rooms_import_earlier_rooms_only():
    for i, room in enumerate(ROOMS):
        imported = {name for name, _ in imports_of(room)}
        assert imported <= set(ROOMS[:i]), f'{room} imports {imported - set(ROOMS[:i])}'


def test_every_room_is_listed():
    found = {'.'.join(file.relative_to(ROOT/'fastai_cam').with_suffix('').parts) for file in (ROOT/'fastai_cam').rglob('*.py')}
    rest = {name for name in found - set(ROOMS) if not name.endswith('__init__')} - {'_modidx', 'all', 'examples.imagenet', 'examples.scenes'}
    assert not rest, f'put these rooms where they belong in ROOMS: {rest}'


def test_nothing_private_crosses_rooms():
    for room in ROOMS:
        for name, taken in imports_of(room):
            private = [one for one in taken if one.startswith('_')]
            assert not private, f'{room} takes {private} from {name}: give it a name of its own, or a room where it belongs'


def lengths(tree):
    "Names and lengths of functions (from the first statement behind the docstring on) and of classes"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef): yield node.name, node.end_lineno - node.lineno + 1, 150
        if not isinstance(node, ast.FunctionDef): continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body: yield node.name, body[-1].end_lineno - body[0].lineno + 1, 30


def riddles(tree):
    "Expressions that need a second read: a choice inside a choice, several loops or conditions in one comprehension"
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse)): yield ast.unparse(node)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if len(node.generators) > 1 or len(node.generators[0].ifs) > 1: yield ast.unparse(node)


def closures_that_call_themselves(tree):
    for outer in ast.walk(tree):
        if not isinstance(outer, ast.FunctionDef): continue
        for inner in ast.walk(outer):
            if inner is outer or not isinstance(inner, ast.FunctionDef): continue
            called = {node.func.id for node in ast.walk(inner) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
            if inner.name in called: yield f'{outer.name}.{inner.name}'


def test_no_closure_calls_itself():
    "It would be a cycle, which keeps whatever it holds (a batch, its activations) until Python's collector comes by"
    found = {room: list(closures_that_call_themselves(ast.parse((ROOT/f'fastai_cam/{room.replace(".", "/")}.py').read_text()))) for room in ROOMS}
    assert not {room: names for room, names in found.items() if names}
    assert list(closures_that_call_themselves(ast.parse('def f():\n def g(x): return g(x - 1)\n return g(3)')))==['f.g']


def test_nothing_is_imported_that_is_not_used():
    for room in ROOMS:
        tree = ast.parse((ROOT/f'fastai_cam/{room.replace(".", "/")}.py').read_text())
        imported = {(alias.asname or alias.name).split('.')[0] for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        quoted = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} # in annotations of what comes later
        assert imported <= used | quoted, f'{room} imports {imported - used - quoted} for nothing'


def test_the_house_keeps_its_measures():
    "Ratchets: they may be lowered, never raised"
    wide, large, long, hard = [], [], [], []
    for room in ROOMS:
        text = (ROOT/f'fastai_cam/{room.replace(".", "/")}.py').read_text()
        assert text.count('\n') <= MOST_LINES, f'{room} has {text.count(chr(10))} lines: it holds more than one idea'
        tree = ast.parse(text)
        wide += [(room, line.strip()[:60]) for line in text.splitlines() if len(line) > 140]
        long += [(room, name, n) for name, n, limit in lengths(tree) if n > limit]
        hard += [(room, code) for code in riddles(tree)]
    for file in (ROOT/'nbs').rglob('*.ipynb'):
        for cell in json.loads(file.read_text())['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type']=='code' and source.startswith('#| export') and source.count('\n') >= 40: large.append((file.stem, source.count('\n') + 1))
    assert len(wide) <= WIDE_LINES, wide
    assert len(large) <= LARGE_CELLS, large
    assert len(long) <= LONG_PARTS, long
    assert len(hard) <= RIDDLES, hard


def test_the_face_is_small():
    import fastai_cam.all as ours
    assert len(ours.__all__) <= 32 and len(set(ours.__all__))==len(ours.__all__)


def test_nothing_of_fastai_is_replaced_by_a_star_import():
    import fastai.vision.all as theirs
    import fastai_cam.all as ours
    replaced = [name for name in ours.__all__ if hasattr(theirs, name) and getattr(theirs, name) is not getattr(ours, name)]
    assert not replaced, f'{replaced}: names of fastai.vision.all that are something else here'


def test_a_name_that_was_renamed_says_so():
    with pytest.raises(ImportError, match='Contrast is called Versus now: from fastai_cam.targets import Versus'): from fastai_cam.targets import Contrast
    with pytest.raises(AttributeError, match='has no attribute'): __import__('fastai_cam.targets', fromlist=['x']).nothing
    from torch import nn
    from fastai_cam.probe import Pass, resolve_layer
    with pytest.raises(AttributeError, match="'tail' of a pass is called 'run_from' now"): Pass(nn.Identity(), []).tail
    with pytest.raises(ValueError, match="'every stage' are called 'stages' now"): resolve_layer(nn.Identity(), 'every stage')
    assert 'Contrast' not in __import__('fastai_cam.all', fromlist=['x']).__all__


def test_hooks_and_modes_live_in_probe_only():
    for room in (name for name in ROOMS if not name.startswith('probe.')):
        text = (ROOT/f'fastai_cam/{room.replace(".", "/")}.py').read_text()
        found = re.findall(r'register_\w*hook|\.eval\(\)|\.train\(\)|set_grad_enabled|enable_grad|no_grad|inference_mode|autograd\.grad', text)
        assert not found, f'{room} has {found}: this belongs into probe'


def test_public_functions_are_annotated_and_documented():
    for file in (ROOT/'fastai_cam').rglob('*.py'):
        if file.stem in ('_modidx', '__init__'): continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
            if isinstance(node, ast.FunctionDef):
                if node.name in ('hook', '__getattr__') or node.name.startswith(('before_', 'after_')): continue
                missing = [a.arg for a in node.args.args if a.annotation is None and a.arg not in ('self', 'cls', 'i', '_', 'func')]
                if ast.get_docstring(node) is None: missing = [] # local helpers of a few words
                assert not missing, f'{file.name}: {node.name} does not say what {missing} are'
            else: assert ast.get_docstring(node), f'{file.name}: class {node.name} has no docstring'


def test_nothing_private_in_the_project():
    "No path of the machine it was made on, no warnings in the outputs, no file of somebody else's"
    private = re.compile('|'.join([re.escape(str(ROOT)) + '/', r'/home/\w+/', r'/root/', 'site-packages/', r'\.\./shared']))
    for file in tracked():
        if file.suffix in ('.png', '.jpg') or file.name in ('test_project.py', 'LICENSE'): continue
        text = file.read_text()
        if file.suffix=='.ipynb':
            cells = json.loads(text)['cells']
            assert not any(out.get('name')=='stderr' for cell in cells for out in cell.get('outputs', [])), f'{file.name} holds warnings: run make notebooks'
            assert not any(out['output_type']=='error' for cell in cells for out in cell.get('outputs', []))
            text = '\n'.join(''.join(cell['source']) + json.dumps([{k: v for k, v in out.get('data', out).items() if 'image' not in k} for out in cell.get('outputs', [])]) for cell in cells)
        assert not private.search(text), f'{file.relative_to(ROOT)} names {private.search(text)[0]!r}'


def requirement_closure(requirements):
    "Names of the installed distributions that `requirements` need, directly or through others"
    todo, found = [Requirement(r) for r in requirements], {}
    while todo:
        req = todo.pop()
        if req.marker and not req.marker.evaluate({'extra': ''}): continue
        name = re.sub(r'[-_.]+', '-', req.name).lower()
        if name in found: continue
        try: found[name] = distribution(name)
        except PackageNotFoundError: continue # not needed on this platform
        todo += [Requirement(r) for r in found[name].requires or []]
    return found


@pytest.mark.slow
def test_wheel_in_a_clean_environment(tmp_path):
    """The built wheel imports and makes a map where there is nothing but itself and what it requires.
    What it requires is not downloaded again but linked, distribution by distribution: nothing of the `dev` extra, and not this checkout, can be imported there."""
    run(sys.executable, '-m', 'build', '--wheel', '--outdir', tmp_path/'dist', ROOT, cwd=tmp_path)
    wheel, = (tmp_path/'dist').glob('*.whl')
    home = tmp_path/'clean'
    venv.create(home, with_pip=True)
    python = home/'bin'/'python'
    site = Path(run(python, '-c', 'import site; print(site.getsitepackages()[0])', cwd=tmp_path).strip())
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-index', wheel, cwd=tmp_path)
    for room in ROOMS:
        for suffix in '.py', '.pyi': assert (site/f'fastai_cam/{room.replace(".", "/")}{suffix}').exists(), f'the wheel lacks {room}{suffix}'
    assert (site/'fastai_cam/py.typed').exists()
    for name in ('page.html.j2', 'page.css', 'page.js', 'parts.js', 'report.schema.json'): assert (site/'fastai_cam/report'/name).exists(), f'the wheel lacks {name}'
    for name in ('explore.css', 'explore.js'): assert (site/'fastai_cam/explore'/name).exists(), f'the wheel lacks {name}'
    requirements = [line.removeprefix('Requires-Dist: ') for line in next(site.glob('fastai_cam-*.dist-info/METADATA')).read_text().splitlines() if line.startswith('Requires-Dist: ')]
    assert {Requirement(r).name for r in requirements if 'extra' not in r}=={'fastai', 'torch', 'matplotlib', 'fastcore'}
    for dist in requirement_closure(requirements).values():
        for top in {file.parts[0] for file in dist.files if file.parts[0] not in ('..', '__pycache__')}:
            source, link = Path(dist.locate_file(top)), site/top
            if source.exists() and not link.exists(): link.symlink_to(source)
    script = """
import importlib.util, sys
assert not any(importlib.util.find_spec(name) for name in ('nbdev', 'pytest', 'pytorch_grad_cam', 'foolbox')), 'the environment is not clean'
import fastai_cam, torch
from torch import nn
from fastai.vision.all import DataLoaders, Learner, TfmdDL
from fastai_cam.all import *
samples = [(torch.rand(3,24,24), i%2) for i in range(6)]
dls = DataLoaders(TfmdDL(samples, bs=4, num_workers=0), TfmdDL(samples, bs=4, num_workers=0))
learn = Learner(dls, nn.Sequential(nn.Conv2d(3,4,3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,2))), loss_func=nn.CrossEntropyLoss())
cams = learn.get_cams(method=['gradcam', 'cam'])
assert torch.allclose(cams.maps[:,0]*22*22, cams.maps[:,1], atol=1e-5) and cams.maps.abs().max() > 0
learn.show_cam(save='map.png')
import importlib, pkgutil
for found in pkgutil.walk_packages(fastai_cam.__path__, 'fastai_cam.'):
    if not found.name.endswith(('examples.imagenet', 'examples.scenes')): importlib.import_module(found.name)
try: import fastai_cam.examples.imagenet; fastai_cam.examples.imagenet.imagenet_learner()
except ImportError as e: assert "fastai_cam[dev]" in str(e)
else: raise AssertionError('the demo ran without its packages')
print(fastai_cam.__file__)
"""
    where = run(python, '-W', 'ignore', '-c', f"import matplotlib; matplotlib.use('agg')\n{script}", cwd=tmp_path).strip().splitlines()[-1]
    assert Path(where).is_relative_to(site) and (tmp_path/'map.png').stat().st_size > 5000


@pytest.mark.parametrize('package', ['foolbox', 'efficientnet_lite_pytorch'])
def test_demo_says_what_to_install(package, monkeypatch):
    import importlib.util
    from fastai_cam.examples import imagenet as demo
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r"fastai_cam\[dev\]"): demo.find_package(package)

# -- documents: what they point at exists

def slug(heading):
    "The anchor that GitHub gives a heading"
    words = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).replace('`', '').strip().lower()
    return re.sub(r'[^\w\- ]', '', words).replace(' ', '-')


def prose(file):
    "The text of a document, or of a notebook's markdown cells, without its code"
    text = file.read_text(encoding='utf-8')
    if file.suffix=='.ipynb': text = '\n\n'.join(''.join(cell['source']) for cell in json.loads(text)['cells'] if cell['cell_type']=='markdown')
    return re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)


def broken_links(file):
    "The relative links and images of a document that lead nowhere"
    for link in re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`\n]*`', '', prose(file))) + re.findall(r'(?:src|href)="([^"]+)"', prose(file)):
        if re.match(r'[a-z]+:', link): continue
        name, _, anchor = link.partition('#')
        base = ROOT if file==ROOT/'nbs/index.ipynb' else file.parent # it is read as README.md
        target = (base/name).resolve() if name else file
        if not target.exists(): yield link
        elif anchor and anchor not in {slug(heading) for heading in re.findall(r'^#+ (.+)$', prose(target), re.M)}: yield link


DOCUMENTS = [ROOT/name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')] + sorted((ROOT/'nbs').rglob('*.ipynb'))


@pytest.mark.parametrize('file', DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file): assert not list(broken_links(file))


def test_broken_links_are_noticed(tmp_path):
    (tmp_path/'there.md').write_text('# A `heading` of [mine](there.md)!\n')
    (tmp_path/'page.md').write_text('[a](there.md) [b](gone.md) [c](there.md#a-heading-of-mine) [d](there.md#no) ![e](no.png) [f](https://x.example/no) `[g](no.md)`\n'
                                    '# Here\n[h](#here) [i](#there)\n```\n[j](no.md)\n```\n')
    assert set(broken_links(tmp_path/'page.md'))=={'gone.md', 'there.md#no', 'no.png', '#there'}


def test_every_room_and_story_is_in_llms_txt():
    text = (ROOT/'nbs/llms.txt').read_text(encoding='utf-8')
    assert text==llms.render(), 'nbs/llms.txt is out of date: run make readme'
    for room in ROOMS: assert f'[fastai_cam.{room}](' in text, room
    for story in (ROOT/'nbs/stories').glob('*.ipynb'): assert f'stories/{story.stem}.html.md)' in text, story.stem


def test_every_module_says_what_it_is_for():
    for file in (ROOT/'fastai_cam').rglob('*.py'):
        if file.name=='_modidx.py' or file==ROOT/'fastai_cam/__init__.py': continue
        summary = (ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or '').split('\n')[0]
        assert len(summary.split()) >= 3, f'{file.relative_to(ROOT)} does not say what it is for'


def test_every_notebook_has_a_number_of_its_own():
    numbers = [re.match(r'\d+[a-z]?', file.stem)[0] for file in (ROOT/'nbs').glob('*.ipynb') if file.stem not in ('index', 'all')]
    assert len(set(numbers))==len(numbers), sorted(number for number in numbers if numbers.count(number) > 1)


def test_the_changelog_names_what_was_renamed():
    changelog = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    for file in (ROOT/'fastai_cam').rglob('__init__.py'):
        for pairs in re.findall(r"__getattr__ = renamed\(__name__, (\{.*?\})\)", file.read_text(encoding='utf-8'), re.S):
            for old, new in ast.literal_eval(pairs).items(): assert f'`{old}`' in changelog and new in changelog, f'{old} -> {new}'


# -- figures

def test_figures_are_as_small_as_they_can_be_looked_at():
    for file in (ROOT/'nbs').rglob('*.ipynb'):
        text = file.read_text(encoding='utf-8')
        assert figures.shrunk(text)==text, f'{file.name} holds large figures: run make figures'


def test_the_notebooks_are_less_than_ten_megabytes():
    assert sum(file.stat().st_size for file in (ROOT/'nbs').rglob('*') if file.is_file()) < 10_000_000, 'run make figures'


def png(pixels):
    "An array as the bytes of a PNG"
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def test_figures_keep_their_colours_and_their_paper():
    wide = np.full((300, 1200, 3), 255, dtype=np.uint8)
    ramp = np.linspace(0, 240, 1000)[None, :, None]*[1, .5, .25] # steps would show
    wide[50:250, 100:1100] = ramp + np.random.default_rng(0).integers(0, 9, (200, 1000, 3))
    small = figures.small(png(wide))
    image = Image.open(io.BytesIO(small))
    found, asked = np.asarray(image.convert('RGB')).astype(float), np.asarray(Image.fromarray(wide).resize((860, 215), Image.Resampling.LANCZOS)).astype(float)
    assert image.size==(860, 215) and figures.small(small)==small and len(small) < len(png(wide))/4
    assert (found[:30]==255).all() and np.abs(found - asked).mean() < 3
    columns = (found - asked)[40:175, 80:780].mean((0, 2)) # dithering is right on average
    assert np.abs(np.convolve(columns, np.ones(20)/20, 'valid')).max() < 2
    drawing = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8), 50, 0), 50, 1)
    small = figures.small(png(drawing))
    assert (np.asarray(Image.open(io.BytesIO(small)).convert('RGB'))==drawing).all() and len(small) <= len(png(drawing))
