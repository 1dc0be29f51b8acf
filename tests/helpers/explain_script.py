"A process that explains a folder of pictures with a small network: `explain_script.py PICTURES TO [dies after so many items]`."
import os
import signal
import sys

import torch
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Normalize, Resize, get_image_files, imagenet_stats, parent_label

import fastai_cam.all
from helpers.tables import learner

pictures, to, dies = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None
torch.set_num_threads(1)
block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda folder: sorted(get_image_files(folder)), get_y=parent_label, splitter=lambda items: (list(range(len(items))),)*2, item_tfms=Resize(64),
                  batch_tfms=Normalize.from_stats(*imagenet_stats))
learn = learner(block.dataloaders(pictures, bs=2, num_workers=0))
if os.environ.get('DIST_INIT'): torch.distributed.init_process_group('gloo')
n = 0


def count(module, inputs, out):
    global n
    n += len(out)
    if dies is not None and n > dies and os.environ.get('RANK', '1')=='1': os.kill(os.getpid(), signal.SIGKILL)


learn.model[0][0].register_forward_hook(count)
store = learn.explain(learn.dls.valid, to, shard=5, method='gradcam')
print(f'{n} items went through the model, {len(store)} are there')
