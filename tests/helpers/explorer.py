"The page of an explorer in a browser, with a kernel that answers when it is told to: what JupyterLab does, without JupyterLab."
import json

from fastai_cam.explore.widget import page_script, widget_class

ADDRESS = 'http://explorer.example/'
STUB = """
const listeners = {}, sent = [], traits = JSON.parse(document.getElementById('traits').textContent);
const call = (name, ...args) => { for (const one of listeners[name] || []) one(...args); };
const model = {get: name => traits[name], send: content => { if (window.isGone) throw Error('no kernel'); sent.push(structuredClone(content)); },
  on: (name, listener) => { (listeners[name] ||= []).push(listener); }, off: (name, listener) => { listeners[name] = (listeners[name] || []).filter(one => one !== listener); }};
window.stub = {take: () => sent.splice(0), receive: news => { for (const [name, value] of news) if (name === 'msg:custom') call(name, value); else { traits[name] = value; call(`change:${name}`); } }};
const widget = await import(URL.createObjectURL(new Blob([document.getElementById('esm').textContent], {type: 'text/javascript'})));
const made = await widget.default();
await made.initialize({model});
window.stop = await made.render({model, el: document.getElementById('cell')});
window.render = el => made.render({model, el});
"""


def in_script(text): return text.replace('<', '\\u003c')


class Wire:
    "A page and its explorer; nothing goes from the one to the other but in `pump`"
    def __init__(self, context, explorer, body='', traits=None):
        self.explorer, self.said, self.out = explorer, [], []
        names = ('facts', 'view', 'marked', 'pictures', 'maps')
        if explorer is not None:
            traits = {name: getattr(explorer.widget, name) for name in names}
            explorer.widget.send = lambda content: self.out.append(['msg:custom', content])
            explorer.widget.observe(lambda change: self.out.append([change.name, change.new]), list(names))
        self.page = context.new_page()
        self.page.add_init_script("addEventListener('securitypolicyviolation', event => console.error('policy: ' + event.violatedDirective))")
        self.page.on('console', lambda message: self.said.append(message.text))
        self.page.on('pageerror', lambda error: self.said.append(str(error)))
        html = f"""<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1"><title>A notebook</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:">
<style>{widget_class()._css}</style><body {body}><main id="cell"></main><script type="application/json" id="traits">{in_script(json.dumps(traits))}</script>
<script type="text/plain" id="esm">{page_script()}</script><script type="module">{STUB}</script></body></html>"""
        self.page.route('**/*', lambda route: route.fulfill(body=html, content_type='text/html; charset=utf-8') if route.request.url==ADDRESS else route.abort())
        self.page.goto(ADDRESS)
        self.page.wait_for_selector('.detail, .nothing', state='attached')
        self.page.wait_for_function('window.stub')

    def pump(self, most=100):
        "Let the kernel answer until nobody asks for anything"
        for _ in range(most):
            asked = self.page.evaluate('stub.take()')
            for content in asked: self.explorer._heard(None, content, [])
            self.page.evaluate('news => stub.receive(news)', self.out)
            self.out.clear()
            if not asked: return
        raise AssertionError('the page asks without end')
