import torch
def rms_norm(x, weight=None, eps=1e-5):
    w=torch.float64 if x.dtype==torch.float64 else torch.float32
    y=x.to(w); y=(y*torch.rsqrt(y.pow(2).mean(-1,keepdim=True)+eps)).to(x.dtype)
    return y if weight is None else weight*y
def gated_rms_norm(x, z, weight, eps, group_size):
    w=torch.float64 if x.dtype==torch.float64 else torch.float32
    y=x.to(w)*torch.nn.functional.silu(z.to(w)); g=y.unflatten(-1,(-1,group_size)); g=g*torch.rsqrt(g.pow(2).mean(-1,keepdim=True)+eps)
    return weight*g.flatten(-2).to(x.dtype)
