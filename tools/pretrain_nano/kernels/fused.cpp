#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <immintrin.h>
#include <vector>
typedef uint16_t u16; typedef __m512 V;
static inline V ld(const u16*p){return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)),16));}
static inline void st(u16*p,V x){_mm256_storeu_si256((__m256i*)p,(__m256i)_mm512_cvtneps_pbh(x));}
static inline V s1(float f){return _mm512_set1_ps(f);}
static inline V vexp(V x){
  x=_mm512_min_ps(_mm512_max_ps(x,s1(-87.f)),s1(87.f));
  V t=_mm512_mul_ps(x,s1(1.44269504f)),n=_mm512_roundscale_ps(t,0),f=_mm512_sub_ps(t,n),p=s1(1.33335581e-3f);
  p=_mm512_fmadd_ps(p,f,s1(9.61812911e-3f));p=_mm512_fmadd_ps(p,f,s1(5.55041087e-2f));p=_mm512_fmadd_ps(p,f,s1(2.40226507e-1f));
  p=_mm512_fmadd_ps(p,f,s1(6.93147181e-1f));p=_mm512_fmadd_ps(p,f,s1(1.f));return _mm512_scalef_ps(p,n);}
static inline V sigm(V x){return _mm512_div_ps(s1(1.f),_mm512_add_ps(s1(1.f),vexp(_mm512_sub_ps(_mm512_setzero_ps(),x))));}
// Phi(z) and phi(z)
static inline void gphi(V z,V&P,V&p){
  V e=vexp(_mm512_mul_ps(_mm512_mul_ps(z,z),s1(-.5f)));p=_mm512_mul_ps(e,s1(0.39894228f));
  V a=_mm512_mul_ps(_mm512_abs_ps(z),s1(0.70710678f));V t=_mm512_div_ps(s1(1.f),_mm512_fmadd_ps(a,s1(0.3275911f),s1(1.f)));
  V q=s1(1.061405429f);q=_mm512_fmadd_ps(q,t,s1(-1.453152027f));q=_mm512_fmadd_ps(q,t,s1(1.421413741f));q=_mm512_fmadd_ps(q,t,s1(-0.284496736f));q=_mm512_fmadd_ps(q,t,s1(0.254829592f));
  V h=_mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(q,t),e),s1(.5f)); // upper tail = .5*erfc(|z|/sqrt2)
  __mmask16 neg=_mm512_cmp_ps_mask(z,_mm512_setzero_ps(),_CMP_LT_OQ);
  P=_mm512_mask_blend_ps(neg,_mm512_sub_ps(s1(1.f),h),h);}
#define CL at::MemoryFormat::ChannelsLast
using T=at::Tensor;
static std::vector<float> tof(const T&w){auto f=w.to(at::kFloat).contiguous();return std::vector<float>(f.data_ptr<float>(),f.data_ptr<float>()+f.numel());}
// x [B,C,H,W] channels_last bf16, t [B,C] bf16 or empty; returns y, stats[B,2,C] (per channel scale mean,rstd)
std::tuple<T,T> gn_fwd(const T&x_,const T&t_,const T&w_,const T&b_,int64_t G,double eps,bool silu){
  auto x=x_.contiguous(CL);int B=x.size(0),C=x.size(1),S=x.size(2)*x.size(3);TORCH_CHECK(C%16==0&&x.scalar_type()==at::kBFloat16);
  auto y=at::empty_like(x);auto stt=at::empty({B,2,C},x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  auto w=tof(w_),bb=tof(b_);std::vector<float> tt=t_.numel()?tof(t_):std::vector<float>((size_t)B*C,0.f);
  const u16*X=(u16*)x.data_ptr();u16*Y=(u16*)y.data_ptr();float*ST=stt.data_ptr<float>();int cg=C/G;
  at::parallel_for(0,B,1,[&](int64_t i0,int64_t i1){std::vector<float> a(C),q(C);
   for(int64_t i=i0;i<i1;i++){const u16*xb=X+i*S*C;u16*yb=Y+i*S*C;const float*t=tt.data()+i*C;float*mu=ST+i*2*C,*rs=mu+C;
    for(int c=0;c<C;c+=16){V s=s1(0),s2=s1(0),tv=_mm512_loadu_ps(t+c);for(int r=0;r<S;r++){V v=_mm512_add_ps(ld(xb+r*C+c),tv);s=_mm512_add_ps(s,v);s2=_mm512_fmadd_ps(v,v,s2);}
      _mm512_storeu_ps(&a[c],s);_mm512_storeu_ps(&q[c],s2);}
    for(int g=0;g<G;g++){double m=0,e=0;for(int c=g*cg;c<g*cg+cg;c++){m+=a[c];e+=q[c];}double N=(double)cg*S;m/=N;e=e/N-m*m;if(e<0)e=0;float r=1/std::sqrt(e+eps);for(int c=g*cg;c<g*cg+cg;c++){mu[c]=m;rs[c]=r;}}
    for(int c=0;c<C;c+=16){V sc=_mm512_mul_ps(_mm512_loadu_ps(&w[c]),_mm512_loadu_ps(rs+c));
      V sh=_mm512_fmadd_ps(_mm512_sub_ps(_mm512_loadu_ps(t+c),_mm512_loadu_ps(mu+c)),sc,_mm512_loadu_ps(&bb[c]));
      if(silu)for(int r=0;r<S;r++){V z=_mm512_fmadd_ps(ld(xb+r*C+c),sc,sh);st(yb+r*C+c,_mm512_mul_ps(z,sigm(z)));}
      else for(int r=0;r<S;r++)st(yb+r*C+c,_mm512_fmadd_ps(ld(xb+r*C+c),sc,sh));}
   }});
  return {y,stt};
}
std::tuple<T,T,T,T> gn_bwd(const T&g_,const T&x_,const T&t_,const T&w_,const T&b_,const T&stt,int64_t G,bool silu){
  auto x=x_.contiguous(CL),g=g_.to(at::kBFloat16).contiguous(CL);int B=x.size(0),C=x.size(1),S=x.size(2)*x.size(3);
  auto dx=at::empty_like(x);auto fo=stt.options();auto dw=at::empty({B,C},fo),db=at::empty({B,C},fo),dt=at::empty({B,C},fo);
  auto w=tof(w_),bb=tof(b_);bool ht=t_.numel();std::vector<float> tt=ht?tof(t_):std::vector<float>((size_t)B*C,0.f);
  const u16*X=(u16*)x.data_ptr(),*Gp=(u16*)g.data_ptr();u16*DX=(u16*)dx.data_ptr();const float*ST=stt.data_ptr<float>();float*DW=dw.data_ptr<float>(),*DB=db.data_ptr<float>(),*DT=dt.data_ptr<float>();int cg=C/G;
  at::parallel_for(0,B,1,[&](int64_t i0,int64_t i1){std::vector<float> k1(C),k2(C),dz((size_t)S*16*(C/16));
   for(int64_t i=i0;i<i1;i++){const u16*xb=X+i*S*C,*gb=Gp+i*S*C;u16*ob=DX+i*S*C;const float*t=tt.data()+i*C,*mu=ST+i*2*C,*rs=mu+C;float*A=DB+i*C,*Q=DW+i*C;
    for(int c=0;c<C;c+=16){V rv=_mm512_loadu_ps(rs+c),mv=_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(t+c),_mm512_loadu_ps(mu+c)),rv),wv=_mm512_loadu_ps(&w[c]),bv=_mm512_loadu_ps(&bb[c]),sa=s1(0),sq=s1(0);float*d=dz.data()+(size_t)c*S;
      for(int r=0;r<S;r++){V h=_mm512_fmadd_ps(ld(xb+r*C+c),rv,mv),gg=ld(gb+r*C+c);
        if(silu){V z=_mm512_fmadd_ps(h,wv,bv),s=sigm(z);gg=_mm512_mul_ps(gg,_mm512_mul_ps(s,_mm512_fmadd_ps(z,_mm512_sub_ps(s1(1.f),s),s1(1.f))));}
        _mm512_storeu_ps(d+r*16,gg);sa=_mm512_add_ps(sa,gg);sq=_mm512_fmadd_ps(gg,h,sq);}
      _mm512_storeu_ps(A+c,sa);_mm512_storeu_ps(Q+c,sq);}
    for(int g=0;g<G;g++){double a=0,q=0;for(int c=g*cg;c<g*cg+cg;c++){a+=(double)w[c]*A[c];q+=(double)w[c]*Q[c];}double N=(double)cg*S;for(int c=g*cg;c<g*cg+cg;c++){k1[c]=a/N;k2[c]=q/N;}}
    for(int c=0;c<C;c+=16){V rv=_mm512_loadu_ps(rs+c),mv=_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(t+c),_mm512_loadu_ps(mu+c)),rv),wv=_mm512_loadu_ps(&w[c]),a=_mm512_loadu_ps(&k1[c]),q=_mm512_loadu_ps(&k2[c]),sd=s1(0);const float*d=dz.data()+(size_t)c*S;
      for(int r=0;r<S;r++){V h=_mm512_fmadd_ps(ld(xb+r*C+c),rv,mv);V o=_mm512_mul_ps(rv,_mm512_fnmadd_ps(h,q,_mm512_fmsub_ps(wv,_mm512_loadu_ps(d+r*16),a)));sd=_mm512_add_ps(sd,o);st(ob+r*C+c,o);}
      _mm512_storeu_ps(DT+i*C+c,sd);}
   }});
  return {dx,ht?dt.to(t_.scalar_type()):at::empty({0},t_.options()),dw.sum(0).to(w_.scalar_type()),db.sum(0).to(w_.scalar_type())};
}
std::tuple<T,T> ln_fwd(const T&x_,const T&w_,const T&b_,double eps){
  auto x=x_.contiguous();int C=x.size(-1);int64_t M=x.numel()/C;TORCH_CHECK(C%16==0&&x.scalar_type()==at::kBFloat16);
  auto y=at::empty_like(x);auto stt=at::empty({M,2},x.options().dtype(at::kFloat));auto w=tof(w_),b=tof(b_);
  const u16*X=(u16*)x.data_ptr();u16*Y=(u16*)y.data_ptr();float*ST=stt.data_ptr<float>();
  at::parallel_for(0,M,256,[&](int64_t i0,int64_t i1){for(int64_t i=i0;i<i1;i++){const u16*xb=X+i*C;V s=s1(0),q=s1(0);
    for(int c=0;c<C;c+=16)s=_mm512_add_ps(s,ld(xb+c));float m=_mm512_reduce_add_ps(s)/C;
    for(int c=0;c<C;c+=16){V d=_mm512_sub_ps(ld(xb+c),s1(m));q=_mm512_fmadd_ps(d,d,q);}float r=1/std::sqrt(_mm512_reduce_add_ps(q)/C+(float)eps);
    ST[2*i]=m;ST[2*i+1]=r;
    for(int c=0;c<C;c+=16)st(Y+i*C+c,_mm512_fmadd_ps(_mm512_mul_ps(_mm512_sub_ps(ld(xb+c),s1(m)),s1(r)),_mm512_loadu_ps(&w[c]),_mm512_loadu_ps(&b[c])));}});
  return {y,stt};
}
std::tuple<T,T,T> ln_bwd(const T&g_,const T&x_,const T&w_,const T&stt){
  auto x=x_.contiguous(),g=g_.to(at::kBFloat16).contiguous();int C=x.size(-1);int64_t M=x.numel()/C;
  auto dx=at::empty_like(x);int64_t CH=256,nc=(M+CH-1)/CH;auto dwb=at::zeros({nc,2,C},stt.options());auto w=tof(w_);
  const u16*X=(u16*)x.data_ptr(),*Gp=(u16*)g.data_ptr();u16*DX=(u16*)dx.data_ptr();const float*ST=stt.data_ptr<float>();float*DWB=dwb.data_ptr<float>();
  at::parallel_for(0,nc,1,[&](int64_t n0,int64_t n1){for(int64_t n=n0;n<n1;n++){float*dw=DWB+n*2*C,*db=dw+C;
   for(int64_t i=n*CH;i<std::min(M,(n+1)*CH);i++){const u16*xb=X+i*C,*gb=Gp+i*C;V r=s1(ST[2*i+1]),m=s1(-ST[2*i]*ST[2*i+1]),a=s1(0),q=s1(0);
    for(int c=0;c<C;c+=16){V h=_mm512_fmadd_ps(ld(xb+c),r,m),gg=ld(gb+c),wg=_mm512_mul_ps(gg,_mm512_loadu_ps(&w[c]));a=_mm512_add_ps(a,wg);q=_mm512_fmadd_ps(wg,h,q);
      _mm512_storeu_ps(dw+c,_mm512_fmadd_ps(gg,h,_mm512_loadu_ps(dw+c)));_mm512_storeu_ps(db+c,_mm512_add_ps(gg,_mm512_loadu_ps(db+c)));}
    V av=s1(_mm512_reduce_add_ps(a)/C),qv=s1(_mm512_reduce_add_ps(q)/C);
    for(int c=0;c<C;c+=16){V h=_mm512_fmadd_ps(ld(xb+c),r,m),wg=_mm512_mul_ps(ld(gb+c),_mm512_loadu_ps(&w[c]));st(DX+i*C+c,_mm512_mul_ps(r,_mm512_fnmadd_ps(h,qv,_mm512_sub_ps(wg,av))));}}}});
  auto s=dwb.sum(0);return {dx,s[0].to(w_.scalar_type()),s[1].to(w_.scalar_type())};
}
T geglu_fwd(const T&h_){auto h=h_.contiguous();int64_t F=h.size(-1)/2,M=h.numel()/(2*F);TORCH_CHECK(F%16==0&&h.scalar_type()==at::kBFloat16);
  auto sz=h.sizes().vec();sz.back()=F;auto y=at::empty(sz,h.options());const u16*H=(u16*)h.data_ptr();u16*Y=(u16*)y.data_ptr();
  at::parallel_for(0,M,64,[&](int64_t i0,int64_t i1){for(int64_t i=i0;i<i1;i++)for(int f=0;f<F;f+=16){V a=ld(H+i*2*F+f),z=ld(H+i*2*F+F+f),P,p;gphi(z,P,p);st(Y+i*F+f,_mm512_mul_ps(a,_mm512_mul_ps(z,P)));}});
  return y;}
T geglu_bwd(const T&g_,const T&h_){auto h=h_.contiguous(),g=g_.to(at::kBFloat16).contiguous();int64_t F=h.size(-1)/2,M=h.numel()/(2*F);
  auto d=at::empty_like(h);const u16*H=(u16*)h.data_ptr(),*Gp=(u16*)g.data_ptr();u16*D=(u16*)d.data_ptr();
  at::parallel_for(0,M,64,[&](int64_t i0,int64_t i1){for(int64_t i=i0;i<i1;i++)for(int f=0;f<F;f+=16){V a=ld(H+i*2*F+f),z=ld(H+i*2*F+F+f),gg=ld(Gp+i*F+f),P,p;gphi(z,P,p);
    st(D+i*2*F+f,_mm512_mul_ps(gg,_mm512_mul_ps(z,P)));st(D+i*2*F+F+f,_mm512_mul_ps(_mm512_mul_ps(gg,a),_mm512_fmadd_ps(z,p,P)));}});
  return d;}
TORCH_LIBRARY(nanoops,m){
  m.def("gn_fwd(Tensor x,Tensor t,Tensor w,Tensor b,int G,float eps,bool silu)->(Tensor,Tensor)",&gn_fwd);
  m.def("gn_bwd(Tensor g,Tensor x,Tensor t,Tensor w,Tensor b,Tensor st,int G,bool silu)->(Tensor,Tensor,Tensor,Tensor)",&gn_bwd);
  m.def("ln_fwd(Tensor x,Tensor w,Tensor b,float eps)->(Tensor,Tensor)",&ln_fwd);
  m.def("ln_bwd(Tensor g,Tensor x,Tensor w,Tensor st)->(Tensor,Tensor,Tensor)",&ln_bwd);
  m.def("geglu_fwd(Tensor h)->Tensor",&geglu_fwd);m.def("geglu_bwd(Tensor g,Tensor h)->Tensor",&geglu_bwd);
}
