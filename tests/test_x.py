import time, gc, os
import torch.distributed as dist
from tests.train import test_lost_rank as t
from distkd.comm import world as comm

def run(world, config, bad_step):
    t0=time.time()
    out = t._train(world, config, bad_step)
    t1=time.time()
    n = len(os.listdir("/proc/self/fd"))
    refs = []
    if world.rank==1:
        pg = dist.distributed_c10d._get_default_group()
        refs=[type(r).__name__ + (":"+",".join(list(r)[:5]) if isinstance(r, dict) else "") for r in gc.get_referrers(pg)]
        ddp=[o for o in gc.get_objects() if type(o).__name__=="DistributedDataParallel"]
        refs.append(len(ddp))
        if ddp:
            refs += [type(r).__name__ + (":"+",".join(map(str,list(r)[:8])) if isinstance(r, dict) else "") for r in gc.get_referrers(ddp[0])]
    del out
    comm.shutdown()
    return t1-t0, time.time()-t1, n, len(os.listdir("/proc/self/fd")), refs

def test_x(ranks, small, tmp_path):
    for i in range(2):
        config = small.config("picture", run={"root": str(tmp_path), "name": f"x{i}", "epochs": 3}, model={"norm":"group"})
        for r in ranks(2).run(run, config=config, bad_step=4): print(r)
