"The page as a person uses it: headless Chromium, with the network off."
import io
import os
import re
import shutil
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.reports import body, hostile_learner, interpretation, many, pictures, plain, waves

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip('playwright.sync_api')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
AXE = Path(os.environ.get('AXE_CORE', Path(__file__).resolve().parent.parent/'.venv/axe/node_modules/axe-core/axe.min.js'))


@pytest.fixture(scope='module')
def browser():
    if CHROMIUM is None: pytest.skip('no chromium here: make browser installs it')
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The pages: of hostile names, of two learners, of six hundred pictures"
    folder = tmp_path_factory.mktemp('pages')
    (folder/'files').mkdir()
    findings = [('<i>Note</i>', 'the <b>background</b> is grey'), ('Table', pd.DataFrame(dict(method=['gradcam'], iou=[.5], iou_low=[.4], iou_high=[.6])))]
    interpretation(hostile_learner(folder/'files')).report(folder/'hostile.html', method=['gradcam', 'layercam'], title='<h1>title</h1>', findings=findings, like=2)
    samples = [(picture, i%2) for i, picture in enumerate(pictures(9))]
    first, second = (interpretation(plain(samples, 2, vocab=['left', 'right'], model=body(2, seed))) for seed in (0, 3))
    first.report(folder/'two.html', other=second, names=('<new>', 'old'))
    many(folder/'many.html', 600, waves())
    return folder


@pytest.fixture
def visit(browser, folder):
    "Opens a page; whatever the console, the network or the policy say is an error"
    said, contexts = [], []
    def go(name, **options):
        context = browser.new_context(offline=True, **{'viewport': dict(width=1280, height=860), **options})
        contexts.append(context)
        page = context.new_page()
        page.add_init_script("addEventListener('securitypolicyviolation', event => console.error('policy: ' + event.violatedDirective))")
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('request', lambda request: said.append(request.url) if not request.url.startswith(('file:', 'data:')) else None)
        page.goto((folder/f'{name}.html').as_uri())
        page.evaluate("document.getElementById('pictures').scrollIntoView()")
        page.wait_for_selector('.pic img')
        return page
    yield go
    for context in contexts: context.close()
    assert said==[]


def count(page): return page.locator('#count').inner_text()
def values(page, n=40): return [float(text) for text in page.locator('.tile .line:first-child .value').all_inner_texts()[:n]]
def losses(page): return [float(text.split()[1]) for text in page.locator('.tile .sub .value').all_inner_texts()]
def shot(page, selector):
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert('RGB')).astype(int)


def test_hostile_names_are_read_and_not_run(visit):
    page = visit('hostile')
    assert page.title()=='<h1>title</h1>' and page.locator('h1').inner_text()=='<h1>title</h1>'
    assert page.locator('.finding h3').first.inner_text()=='<i>Note</i>'
    shown = ' '.join(page.locator('#class option').all_inner_texts())
    assert '<script>document.title="run"</script>' in shown and "javascript:document.title='run'" in shown
    for at in range(5):
        page.locator('.tile').nth(at).click()
        assert page.locator('#large').evaluate('one => one.open')
        page.keyboard.press('Escape')
    assert page.title()=='<h1>title</h1>'
    assert page.evaluate('document.documentElement.scrollWidth') <= 1280 # ten thousand letters are cut
    assert page.locator('.tile bdi').count() >= 20 # names are isolated, so that none turns the numbers behind it around
    assert max(len(text) for text in page.locator('bdi').all_inner_texts()) < 700


def test_it_is_sorted(visit):
    page = visit('many')
    assert losses(page)==sorted(losses(page), reverse=True) and losses(page)[0] > 3
    page.select_option('#sort', '-loss')
    assert losses(page)==sorted(losses(page)) and losses(page)[0] < .1
    page.select_option('#sort', 'sure')
    assert values(page)==sorted(values(page), reverse=True)
    page.select_option('#sort', 'label')
    page.evaluate("scrollTo(0, 0)")
    assert page.locator('.tile .sub bdi').first.inner_text()=='class 0'


def test_it_is_filtered(visit):
    page = visit('many')
    assert count(page)=='600 pictures'
    page.locator('#status label', has_text='Wrong').click()
    n_wrong = int(count(page).split()[0])
    assert 100 < n_wrong < 200 and page.locator('.mark.ok').count()==0 and page.locator('.mark.bad').count() > 5
    page.select_option('#class', '3')
    assert int(count(page).split()[0]) < n_wrong
    assert all('class 3' in text for text in page.locator('.tile .said').all_inner_texts())
    page.locator('#status label', has_text='All').click()
    page.select_option('#class', '')
    page.fill('#search', 'CLASS 4/')
    assert set(page.locator('.tile .sub bdi').all_inner_texts())=={'class 4'}
    page.fill('#search', 'class 4/ nothing')
    assert count(page)=='0 of 600 pictures'
    page.click('#clear')
    assert count(page)=='600 pictures'
    page.locator('#sure').fill('90')
    assert min(values(page)) >= .9
    page.fill('#loss', '3.5')
    assert min(losses(page)) >= 3.5


def test_a_confusion_leads_to_its_pictures(visit):
    page = visit('many')
    button = page.locator('[data-actual]').first
    n = button.inner_text()
    button.click()
    assert count(page).startswith(f'{n} of 600 pictures')
    page.locator('.chip').click()
    assert count(page)=='600 pictures'


def test_the_slider_changes_pixels_and_nothing_else(visit):
    page = visit('many')
    page.wait_for_timeout(200)
    before = shot(page, '.frame')
    made = page.evaluate("document.querySelector('.pic img').src.length")
    page.locator('#opacity').fill('0')
    page.wait_for_timeout(100)
    photo = shot(page, '.frame')
    page.locator('#opacity').fill('100')
    page.wait_for_timeout(100)
    full = shot(page, '.frame')
    assert np.abs(before - photo).mean() > 3 and np.abs(full - photo).mean() > 1.2*np.abs(before - photo).mean()
    assert page.evaluate("document.querySelector('.pic img').src.length")==made
    assert page.locator('#large-opacity').input_value()=='100' # the large view has the same


def test_methods_questions_and_colours_are_switched(visit):
    page = visit('many')
    page.wait_for_timeout(200)
    seen = [shot(page, '.frame')]
    for change in (lambda: page.select_option('#method', '1'), lambda: page.locator('#ask label', has_text='Label').click(), lambda: page.locator('#ask label', has_text='Difference').click(),
                   lambda: page.select_option('#method', '0'), lambda: (page.locator('#ask label', has_text='Prediction').click(), page.select_option('#colours', 'viridis')), lambda: page.select_option('#colours', 'signed')):
        change()
        page.wait_for_timeout(120)
        seen.append(shot(page, '.frame'))
        assert np.abs(seen[-1] - seen[-2]).mean() > 1


def test_training_pictures_in_the_large_view(visit):
    page = visit('hostile')
    page.locator('#grid li button').first.click()
    page.wait_for_selector('#large-like img')
    like = page.locator('#large-like')
    assert 'labelled' in like.inner_text() and '(predicted)' in like.inner_text() and '(runner-up)' in like.inner_text()
    assert like.locator('li').count()==like.locator('img').count() >= 2 and not like.locator('b, i, script, h1').count(), 'names are text'
    assert all(like.evaluate("one => [...one.querySelectorAll('img')].map(img => img.complete && img.naturalWidth > 8)"))
    assert all(alt.startswith('training picture ') for alt in like.evaluate("one => [...one.querySelectorAll('img')].map(img => img.alt)"))
    page = visit('two')
    page.locator('#grid li button').first.click()
    page.wait_for_selector('#large .pic img')
    assert not page.locator('#large-like').is_visible(), 'where none were asked for'


def test_the_large_view(visit):
    page = visit('many')
    page.locator('.tile').nth(2).click()
    page.wait_for_selector('#large .pic img')
    assert page.locator('#large-place').inner_text()=='3 of 600'
    title = page.locator('#large-title').inner_text()
    assert re.fullmatch(r'class \d/\d{5}\.jpg', title)
    before = shot(page, '#large .pic')
    page.locator('#large-opacity').fill('10')
    page.wait_for_timeout(100)
    assert np.abs(shot(page, '#large .pic') - before).mean() > 3
    page.locator('#large-ask label', has_text='Difference').click()
    assert '−' in page.locator('#large figcaption').inner_text() and page.locator('#legend-low').inner_text()=='for the label'
    facts = page.locator('#large-facts').inner_text()
    assert 'actual' in facts and 'predicted' in facts and 'loss' in facts and 'Most probable' in facts
    page.click('#next')
    assert page.locator('#large-place').inner_text()=='4 of 600' and page.locator('#large-title').inner_text() != title
    page.click('#close')
    assert not page.locator('#large').evaluate('one => one.open')


def test_everything_with_the_keyboard(visit):
    page = visit('many')
    focus = lambda: page.evaluate("document.activeElement.id || document.activeElement.className")
    page.keyboard.press('/')
    assert focus()=='search'
    page.keyboard.type('class 5/')
    page.keyboard.press('Enter')
    at = lambda: page.evaluate("+document.activeElement.parentElement.getAttribute('aria-posinset')")
    columns = page.evaluate("[...document.querySelectorAll('#grid li')].filter(li => Math.abs(li.getBoundingClientRect().top - document.querySelector('#grid li').getBoundingClientRect().top) < 2).length")
    assert at()==1
    page.keyboard.press('ArrowRight'), page.keyboard.press('ArrowRight')
    assert at()==3
    page.keyboard.press('ArrowDown')
    assert at()==3 + columns
    page.keyboard.press('End')
    last = at()
    assert last==int(count(page).split()[0])
    page.keyboard.press('Home')
    assert at()==1
    page.keyboard.press('Enter')
    page.wait_for_selector('#large .pic img')
    assert focus()=='large-title'
    page.keyboard.press('ArrowRight')
    assert page.locator('#large-place').inner_text().startswith('2 of')
    for _ in range(20): # never out of the dialog
        page.keyboard.press('Tab')
        assert page.evaluate("document.getElementById('large').contains(document.activeElement)")
    for _ in range(20):
        page.keyboard.press('Shift+Tab')
        assert page.evaluate("document.getElementById('large').contains(document.activeElement)")
    page.keyboard.press('Escape')
    page.wait_for_timeout(100)
    assert at()==2 # where one was
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != 'none' # it can be seen where one is


def ground(page): return [int(x) for x in re.findall(r'\d+', page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))[:3]]


def test_light_and_dark(visit):
    page = visit('two', color_scheme='dark')
    assert max(ground(page)) < 60
    page.click('#theme')
    assert min(ground(page)) > 200 and page.locator('#theme').inner_text()=='Theme: light'
    page.click('#theme')
    assert max(ground(page)) < 60
    assert min(ground(visit('two', color_scheme='light'))) > 200


@pytest.mark.parametrize('name', ['many', 'hostile', 'two'])
def test_on_a_phone(visit, name):
    page = visit(name, viewport=dict(width=360, height=740), device_scale_factor=2)
    assert page.evaluate('document.documentElement.scrollWidth') <= 360
    first, second = (page.locator('#grid li').nth(i).bounding_box() for i in (0, 1))
    assert (abs(first['y'] - second['y']) < 2)==(name != 'two') # two beside each other; of two learners, one
    page.locator('.tile').first.click()
    page.wait_for_selector('#large .pic img')
    box = page.locator('#large .pic').first.bounding_box()
    assert box['x'] >= 0 and box['x'] + box['width'] <= 360


def test_on_paper(visit, tmp_path):
    page = visit('many')
    page.pdf(path=tmp_path/'page.pdf', format='A4')
    content = (tmp_path/'page.pdf').read_bytes()
    assert len(re.findall(rb'/Type\s*/Page\b', content)) > 5 # two hundred pictures, not what the window showed
    assert len(re.findall(rb'/Subtype\s*/Image', content)) >= 200 # the photos, not their frames alone
    page.emulate_media(media='print')
    assert not page.locator('#tools').is_visible() and page.locator('.cards').is_visible()
    assert page.locator('#rest').inner_text()=='' and page.locator('#grid li').count() < 200 # afterwards as before


def test_two_learners(visit):
    page = visit('two')
    assert page.locator('.tile').first.locator('.pic').count()==2
    page.locator('#status label', has_text='Worse').click()
    n = int(count(page).split()[0])
    page.locator('#status label', has_text='Better').click()
    said = page.locator('.lead').inner_text()
    assert f'{n} got worse' in said and f'{int(count(page).split()[0])} got better' in said
    page.locator('#status label', has_text='All').click()
    page.locator('.tile').first.click()
    page.wait_for_selector('#large .pic img')
    assert page.locator('#large figure').count()==2 and page.locator('#large figcaption b').all_inner_texts()==['<new>: ', 'old: ']


@pytest.mark.parametrize('name, options', [('many', {}), ('two', dict(color_scheme='dark')), ('hostile', {}), ('many', dict(viewport=dict(width=360, height=740), color_scheme='dark'))])
def test_it_is_accessible(visit, name, options):
    assert AXE.exists(), 'axe-core is not here: make browser brings it'
    page = visit(name, bypass_csp=True, **options)
    def wrong():
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")['violations']
        return [(one['id'], one['impact'], [node['html'][:150] for node in one['nodes']][:3]) for one in found if one['impact'] in ('serious', 'critical', 'moderate')]
    page.evaluate(AXE.read_text())
    assert wrong()==[]
    page.locator('.tile').first.click()
    page.wait_for_selector('#large .pic img')
    assert wrong()==[]


def test_it_is_there_at_once_and_stays_small(visit, folder):
    start = perf_counter()
    page = visit('many')
    assert perf_counter() - start < 8 # seconds, beside whatever else runs; the bench has the numbers
    for _ in range(12):
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(60)
    assert page.locator('#grid li').count() < 80 and page.locator('#grid li').last.get_attribute('aria-setsize')=='600'
    page.wait_for_timeout(200)
    inside = page.evaluate("[...document.querySelectorAll('#grid li')].filter(li => { const box = li.getBoundingClientRect(); return box.bottom > 0 && box.top < innerHeight && !li.querySelector('.pic img'); }).length")
    assert inside==0 and (folder/'many.html').stat().st_size < 50_000_000
