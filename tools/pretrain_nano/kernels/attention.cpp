#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <immintrin.h>
#include <vector>
#include <cstring>
typedef uint32_t u32; typedef uint16_t u16;
template<int R,int NV> static inline void mk(const u32*A,long ars,long aks,const u32*B,long ldb,int K,float*C,long ldc){
  __m512 acc[R][NV];
  for(int r=0;r<R;r++)for(int j=0;j<NV;j++)acc[r][j]=_mm512_setzero_ps();
  for(int k=0;k<K;k++){
    __m512i b[NV];
    for(int j=0;j<NV;j++)b[j]=_mm512_loadu_si512(B+k*ldb+16*j);
    for(int r=0;r<R;r++){
      __m512i a=_mm512_set1_epi32((int)A[r*ars+k*aks]);
      for(int j=0;j<NV;j++)acc[r][j]=_mm512_dpbf16_ps(acc[r][j],(__m512bh)a,(__m512bh)b[j]);
    }
  }
  for(int r=0;r<R;r++)for(int j=0;j<NV;j++)_mm512_storeu_ps(C+r*ldc+16*j,acc[r][j]);
}
template<int R> static inline void mkn(int nv,const u32*A,long ars,long aks,const u32*B,long ldb,int K,float*C,long ldc){
  while(nv>=4){mk<R,4>(A,ars,aks,B,ldb,K,C,ldc);nv-=4;B+=64;C+=64;}
  if(nv==3)mk<R,3>(A,ars,aks,B,ldb,K,C,ldc);else if(nv==2)mk<R,2>(A,ars,aks,B,ldb,K,C,ldc);else if(nv==1)mk<R,1>(A,ars,aks,B,ldb,K,C,ldc);
}
static inline __m512 vexp(__m512 x){
  x=_mm512_max_ps(x,_mm512_set1_ps(-87.f));
  __m512 t=_mm512_mul_ps(x,_mm512_set1_ps(1.44269504f));
  __m512 n=_mm512_roundscale_ps(t,0);
  __m512 f=_mm512_sub_ps(t,n);
  __m512 p=_mm512_set1_ps(1.33335581e-3f);
  p=_mm512_fmadd_ps(p,f,_mm512_set1_ps(9.61812911e-3f));
  p=_mm512_fmadd_ps(p,f,_mm512_set1_ps(5.55041087e-2f));
  p=_mm512_fmadd_ps(p,f,_mm512_set1_ps(2.40226507e-1f));
  p=_mm512_fmadd_ps(p,f,_mm512_set1_ps(6.93147181e-1f));
  p=_mm512_fmadd_ps(p,f,_mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p,n);
}
static inline __m256i tobf(__m512 x){return (__m256i)_mm512_cvtneps_pbh(x);}
static inline u16 sbf(float f){u32 u;memcpy(&u,&f,4);return (u+0x7fff+((u>>16)&1))>>16;}
static inline float fbf(u16 h){u32 u=(u32)h<<16;float f;memcpy(&f,&u,4);return f;}
// X: n rows of d bf16, row stride rs (bf16). dst[dp][npad]  (pairs along d)
static void packT(const u16*X,long rs,int n,int d,int npad,u32*dst){
  for(int i=0;i<n;i++){const u32*x=(const u32*)(X+i*rs);for(int k=0;k<d/2;k++)dst[k*npad+i]=x[k];}
  for(int k=0;k<d/2;k++)for(int i=n;i<npad;i++)dst[k*npad+i]=0;
}
// dst[np][dpad] pairs along rows
static void packV(const u16*X,long rs,int n,int d,int np,int dpad,u32*dst){
  for(int p=0;p<np;p++){
    u32*o=dst+p*dpad;const u16*a=X+(2*p)*rs,*b=a+rs;
    if(2*p+1<n)for(int j=0;j<d;j++)o[j]=(u32)a[j]|((u32)b[j]<<16);
    else if(2*p<n)for(int j=0;j<d;j++)o[j]=a[j];
    else for(int j=0;j<d;j++)o[j]=0;
    for(int j=d;j<dpad;j++)o[j]=0;
  }
}
static void store_rows(const float*C,long ldc,u16*o,long rs,int R,int d,const float*sc){
  for(int r=0;r<R;r++){__m512 s=_mm512_set1_ps(sc?sc[r]:1.f);int j=0;
    for(;j<d;j+=16){int rem=d-j;__mmask16 m=rem>=16?0xffff:(1<<rem)-1;
      _mm256_mask_storeu_epi16(o+r*rs+j,m,tobf(_mm512_mul_ps(_mm512_loadu_ps(C+r*ldc+j),s)));}}
}
constexpr int R=4;
std::tuple<at::Tensor,at::Tensor> fwd(const at::Tensor&q_,const at::Tensor&k_,const at::Tensor&v_,int64_t H){
  auto q=q_.contiguous(),k=k_.contiguous(),v=v_.contiguous();
  int B=q.size(0),S=q.size(1),T=k.size(1);long D=q.size(2);int d=D/H;
  TORCH_CHECK(q.scalar_type()==at::kBFloat16&&k.scalar_type()==at::kBFloat16&&v.scalar_type()==at::kBFloat16&&S%4==0&&d%2==0);
  int Tp=(T+15)/16*16,dp=(d+15)/16*16;float scale=1.f/std::sqrt((float)d);
  auto o=at::empty_like(q);auto L=at::empty({B,H,S},q.options().dtype(at::kFloat));
  const u16*Q=(u16*)q.data_ptr(),*K=(u16*)k.data_ptr(),*V=(u16*)v.data_ptr();u16*O=(u16*)o.data_ptr();float*LS=L.data_ptr<float>();
  at::parallel_for(0,(int64_t)B*H,1,[&](int64_t b0,int64_t b1){
    std::vector<u32> Kp(d/2*Tp),Vp(Tp/2*dp),P(R*Tp/2);std::vector<float> sc(R*Tp),oc(R*dp);
    for(int64_t bh=b0;bh<b1;bh++){int b=bh/H,h=bh%H;
      const u16*qb=Q+(long)b*S*D+h*d,*kb=K+(long)b*T*D+h*d,*vb=V+(long)b*T*D+h*d;u16*ob=O+(long)b*S*D+h*d;
      packT(kb,D,T,d,Tp,Kp.data());packV(vb,D,T,d,Tp/2,dp,Vp.data());
      for(int s=0;s<S;s+=R){
        mkn<R>(Tp/16,(const u32*)(qb+(long)s*D),D/2,1,Kp.data(),Tp,d/2,sc.data(),Tp);
        float inv[R];
        for(int r=0;r<R;r++){float*x=sc.data()+r*Tp;
          for(int t=T;t<Tp;t++)x[t]=-1e30f;
          __m512 m=_mm512_loadu_ps(x);for(int t=16;t<Tp;t+=16)m=_mm512_max_ps(m,_mm512_loadu_ps(x+t));
          float mx=_mm512_reduce_max_ps(m)*scale;__m512 vm=_mm512_set1_ps(mx),vs=_mm512_set1_ps(scale),sum=_mm512_setzero_ps();
          for(int t=0;t<Tp;t+=16){__m512 e=vexp(_mm512_fmsub_ps(_mm512_loadu_ps(x+t),vs,vm));sum=_mm512_add_ps(sum,e);
            _mm256_storeu_si256((__m256i*)((u16*)P.data()+r*Tp+t),tobf(e));}
          float l=_mm512_reduce_add_ps(sum);inv[r]=1.f/l;LS[bh*S+s+r]=mx+std::log(l);}
        mkn<R>(dp/16,P.data(),Tp/2,1,Vp.data(),dp,Tp/2,oc.data(),dp);
        store_rows(oc.data(),dp,ob+(long)s*D,D,R,d,inv);
      }}});
  return {o,L};
}
std::tuple<at::Tensor,at::Tensor,at::Tensor> bwd(const at::Tensor&g_,const at::Tensor&q_,const at::Tensor&k_,const at::Tensor&v_,const at::Tensor&o_,const at::Tensor&L,int64_t H){
  auto q=q_.contiguous(),k=k_.contiguous(),v=v_.contiguous(),o=o_.contiguous(),g=g_.to(at::kBFloat16).contiguous();
  int B=q.size(0),S=q.size(1),T=k.size(1);long D=q.size(2);int d=D/H;
  int Tp=(T+15)/16*16,dp=(d+15)/16*16;float scale=1.f/std::sqrt((float)d);
  auto dq=at::empty_like(q),dk=at::empty_like(k),dv=at::empty_like(v);
  const u16*Q=(u16*)q.data_ptr(),*K=(u16*)k.data_ptr(),*V=(u16*)v.data_ptr(),*O=(u16*)o.data_ptr(),*G=(u16*)g.data_ptr();
  u16*DQ=(u16*)dq.data_ptr(),*DK=(u16*)dk.data_ptr(),*DV=(u16*)dv.data_ptr();const float*LS=L.data_ptr<float>();
  at::parallel_for(0,(int64_t)B*H,1,[&](int64_t b0,int64_t b1){
    std::vector<u32> Kp(d/2*Tp),Vt(d/2*Tp),Kv(Tp/2*dp),Gv(S/2*dp),Qv(S/2*dp),DS(R*Tp/2),Pi(S/2*Tp),Di(S/2*Tp);
    std::vector<float> sc(R*Tp),dpb(R*Tp),oc(R*dp);
    for(int64_t bh=b0;bh<b1;bh++){int b=bh/H,h=bh%H;
      long qo=(long)b*S*D+h*d,ko=(long)b*T*D+h*d;
      packT(K+ko,D,T,d,Tp,Kp.data());packT(V+ko,D,T,d,Tp,Vt.data());packV(K+ko,D,T,d,Tp/2,dp,Kv.data());
      packV(G+qo,D,S,d,S/2,dp,Gv.data());packV(Q+qo,D,S,d,S/2,dp,Qv.data());
      for(int s=0;s<S;s+=R){
        mkn<R>(Tp/16,(const u32*)(Q+qo+(long)s*D),D/2,1,Kp.data(),Tp,d/2,sc.data(),Tp);
        mkn<R>(Tp/16,(const u32*)(G+qo+(long)s*D),D/2,1,Vt.data(),Tp,d/2,dpb.data(),Tp);
        for(int r=0;r<R;r+=2){
          float del[2];
          for(int i=0;i<2;i++){const u16*gr=G+qo+(long)(s+r+i)*D,*orr=O+qo+(long)(s+r+i)*D;__m512 a=_mm512_setzero_ps();
            for(int j=0;j<d;j+=16){int rem=d-j;__mmask16 m=rem>=16?0xffff:(1<<rem)-1;
              __m512 gg=_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m,gr+j)),16));
              __m512 oo=_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m,orr+j)),16));
              a=_mm512_fmadd_ps(gg,oo,a);}
            del[i]=_mm512_reduce_add_ps(a);}
          float*x0=sc.data()+r*Tp,*x1=x0+Tp,*y0=dpb.data()+r*Tp,*y1=y0+Tp;
          for(int t=T;t<Tp;t++)x0[t]=x1[t]=-1e30f;
          __m512 l0=_mm512_set1_ps(LS[bh*S+s+r]),l1=_mm512_set1_ps(LS[bh*S+s+r+1]),vs=_mm512_set1_ps(scale),d0=_mm512_set1_ps(del[0]),d1=_mm512_set1_ps(del[1]);
          u32*pi=Pi.data()+(long)(s+r)/2*Tp,*di=Di.data()+(long)(s+r)/2*Tp;
          for(int t=0;t<Tp;t+=16){
            __m512 p0=vexp(_mm512_fmsub_ps(_mm512_loadu_ps(x0+t),vs,l0)),p1=vexp(_mm512_fmsub_ps(_mm512_loadu_ps(x1+t),vs,l1));
            __m512 e0=_mm512_mul_ps(_mm512_mul_ps(p0,vs),_mm512_sub_ps(_mm512_loadu_ps(y0+t),d0)),e1=_mm512_mul_ps(_mm512_mul_ps(p1,vs),_mm512_sub_ps(_mm512_loadu_ps(y1+t),d1));
            __m256i pb0=tobf(p0),pb1=tobf(p1),eb0=tobf(e0),eb1=tobf(e1);
            _mm512_storeu_si512(pi+t,_mm512_or_si512(_mm512_cvtepu16_epi32(pb0),_mm512_slli_epi32(_mm512_cvtepu16_epi32(pb1),16)));
            _mm512_storeu_si512(di+t,_mm512_or_si512(_mm512_cvtepu16_epi32(eb0),_mm512_slli_epi32(_mm512_cvtepu16_epi32(eb1),16)));
            _mm256_storeu_si256((__m256i*)((u16*)DS.data()+r*Tp+t),eb0);
            _mm256_storeu_si256((__m256i*)((u16*)DS.data()+(r+1)*Tp+t),eb1);
          }}
        mkn<R>(dp/16,DS.data(),Tp/2,1,Kv.data(),dp,Tp/2,oc.data(),dp);
        store_rows(oc.data(),dp,DQ+qo+(long)s*D,D,R,d,nullptr);
      }
      for(int t=0;t<T;t+=R){int rr=std::min(R,T-t);
        mkn<R>(dp/16,Pi.data()+t,1,Tp,Gv.data(),dp,S/2,oc.data(),dp);store_rows(oc.data(),dp,DV+ko+(long)t*D,D,rr,d,nullptr);
        mkn<R>(dp/16,Di.data()+t,1,Tp,Qv.data(),dp,S/2,oc.data(),dp);store_rows(oc.data(),dp,DK+ko+(long)t*D,D,rr,d,nullptr);
      }}});
  return {dq,dk,dv};
}
TORCH_LIBRARY(nanoattn,m){
  m.def("fwd(Tensor q,Tensor k,Tensor v,int H)->(Tensor,Tensor)");
  m.def("bwd(Tensor g,Tensor q,Tensor k,Tensor v,Tensor o,Tensor L,int H)->(Tensor,Tensor,Tensor)");
}
TORCH_LIBRARY_IMPL(nanoattn,CPU,m){m.impl("fwd",&fwd);m.impl("bwd",&bwd);}
