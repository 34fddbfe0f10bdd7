"""Rounding of the decays' gradient of the walks, followed in torch on a CPU: python decay_rounding.py > RECORD"""
import json

import torch
L2=1.4426950408889634
def bf(x): return x.to(torch.bfloat16).to(x.dtype)
def grads(q,k,v,do,g,S0,dSend, rounded, dt, restart=None):
    # q,k [T,K], v,do [T,V], g [T]; returns gradient of log decay
    T,K=q.shape; C=64
    r = bf if rounded else (lambda x:x)
    q,k,v,do=(x.to(dt) for x in (q,k,v,do)); g=g.to(dt)*L2
    N=-(-T//C)
    rows=torch.zeros(T,dtype=dt)
    S=S0.to(dt).clone(); states=[]
    for n in range(N):
        s=slice(n*C,min(T,n*C+C)); G=g[s].cumsum(0); tot=G[-1]
        states.append(S.clone()) 
        read=(do[s]@r(S).T)*torch.exp2(G)[:,None]
        rows[s]+=(read*q[s]).sum(1)
        S=S*torch.exp2(tot)+r(k[s]*torch.exp2(tot-G)[:,None]).T@v[s]
    final=S
    dS=dSend.to(dt).clone(); 
    if rounded: ends=(final*bf(dSend)).sum()
    else: ends=(final*dSend.to(dt)).sum()
    bounds={}
    for n in reversed(range(N)):
        s=slice(n*C,min(T,n*C+C)); G=g[s].cumsum(0); tot=G[-1]
        bounds[n]=(S_end:= (final if n==N-1 else states[n+1]), dS.clone())
        dvr=(k[s]@r(dS))*torch.exp2(tot-G)[:,None]
        rows[s]-=(dvr*v[s]).sum(1)
        D=torch.exp2(torch.where(torch.ones(len(G),len(G)).tril().bool(),G[:,None]-G[None,:],torch.tensor(float('-inf'),dtype=dt)))
        P=(q[s]@k[s].T)*D*(do[s]@v[s].T); P.fill_diagonal_(0)
        rows[s]+=P.sum(1)-P.sum(0)
        dS=dS*torch.exp2(tot)+r(q[s]*torch.exp2(G)[:,None]).T@do[s]
    rows=rows.double() if not rounded else rows
    out=rows.flip(0).cumsum(0).flip(0)+ends
    if restart:
        out=rows.clone()
        for a in range(0,N,restart):
            e=min(a+restart,N); s=slice(a*C,min(T,e*C))
            Send,dSe=bounds[e-1]
            base=(Send*(bf(dSe) if rounded else dSe)).sum()
            out[s]=rows[s].flip(0).cumsum(0).flip(0)+base
    return out

def run(T,D,seed,restart):
    torch.manual_seed(seed)
    q=bf(torch.randn(T,D)); k=bf(torch.randn(T,D)*D**-.5); v=bf(torch.randn(T,D)); do=bf(torch.randn(T,D))
    g,zero=-(5*torch.rand(T)**4),torch.zeros(D,D)
    t=grads(q,k,v,do,g,zero,zero,False,torch.float64)
    return [float((x-t).square().mean().sqrt()/t.square().mean().sqrt()) for x in (grads(q,k,v,do,g,zero,zero,True,torch.float32),grads(q,k,v,do,g,zero,zero,True,torch.float32,restart=restart))]

rows=[]
for D in (64,128):
    for T,restart in ((2048,32),(4096,32),(8192,32),(32768,64)):
        found=torch.tensor([run(T,D,seed,restart) for seed in range(4)])
        rows.append({"tokens":T,"width":D,"seeds":4,"n":4,"error":[round(x,4) for x in found[:,0].tolist()],"error, sums anew every "+str(restart)+" chunks":[round(x,4) for x in found[:,1].tolist()]})
print(json.dumps(rows))
