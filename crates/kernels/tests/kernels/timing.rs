use crate::reference::{Input, devices, numbers};
use burn::tensor::Tensor;
use pronk_kernels::{RopeScaling, Rotary, Span, Tracked, attention, plain, pull_back, rms_norm, swiglu};
use std::time::Instant;

fn time<const D: usize, const E: usize>(
    what: &str,
    inputs: &[Input<D>],
    mut f: impl FnMut(Vec<Tensor<D>>) -> Tensor<E>,
    device: &burn::tensor::Device,
) -> [f64; 3] {
    let mut best = [f64::MAX; 3];
    let mut weights: Option<Tensor<E>> = None;
    for _ in 0..if label_reps() { 200 } else { 15 } {
        let x: Vec<Tensor<D>> = inputs.iter().map(|i| i.on(device)).collect();
        let t = Instant::now();
        let y = f(x);
        best[0] = best[0].min(t.elapsed().as_secs_f64() * 1e3);
        drop(y);
        let x: Vec<Tensor<D>> = inputs.iter().map(|i| i.on(device).tracked()).collect();
        // behind an operation, as in a block
        let x2: Vec<Tensor<D>> = x.iter().map(|x| x.clone() * 1.0).collect();
        let t = Instant::now();
        let y = f(x2);
        best[1] = best[1].min(t.elapsed().as_secs_f64() * 1e3);
        let w = weights
            .get_or_insert_with(|| {
                Input { values: numbers(y.shape().num_elements(), 9), shape: y.dims() }.on(device)
            })
            .clone();
        let t = Instant::now();
        let g = pull_back(&y, w);
        best[2] = best[2].min(t.elapsed().as_secs_f64() * 1e3);
        drop(g);
    }
    let _ = what;
    best
}

fn label_reps() -> bool {
    std::env::var_os("TINY").is_some()
}

#[test]
#[ignore = "timing"]
fn timing() {
    for (name, device) in devices() {
        for (label, tokens, hidden, inter, heads, kv, dim, n) in [
            ("tiny", 1usize, 576usize, 1536usize, 9usize, 3usize, 64usize, 1usize),
            ("smol", 900, 576usize, 1536usize, 9usize, 3usize, 64usize, 8usize),
            ("7b", 512, 4096, 11008, 32, 32, 128, 1),
        ] {
            if label_reps() != (label == "tiny") {
                continue;
            }
            let show = |what: &str, identity: [f64; 3], fused: [f64; 3], plain: [f64; 3]| {
                println!(
                    "{name} {label} {what}: fused unrecorded {:.3} recorded {:.3} backward {:.3} | plain {:.3} {:.3} {:.3} | ratio {:.1} {:.1} {:.1} (pull_back alone {:.3})",
                    fused[0],
                    fused[1],
                    fused[2] - identity[2],
                    plain[0],
                    plain[1],
                    plain[2] - identity[2],
                    plain[0] / fused[0],
                    plain[1] / fused[1],
                    (plain[2] - identity[2]) / (fused[2] - identity[2]),
                    identity[2]
                );
            };
            let x = [Input::random([tokens, hidden], 1)];
            let w = Input::random([hidden], 2).on(&device);
            let id = time("", &x, |mut x| x.remove(0), &device);
            show(
                "norm",
                id,
                time("", &x, |mut x| rms_norm(x.remove(0), &w, 1e-5), &device),
                time("", &x, |mut x| plain::rms_norm(x.remove(0), &w, 1e-5), &device),
            );
            let g = [Input::random([tokens, inter], 1), Input::random([tokens, inter], 2)];
            let id = time("", &g, |mut x| x.remove(0), &device);
            show(
                "swiglu",
                id,
                time(
                    "",
                    &g,
                    |mut x| {
                        let g = x.remove(0);
                        swiglu(g, x.remove(0))
                    },
                    &device,
                ),
                time(
                    "",
                    &g,
                    |mut x| {
                        let g = x.remove(0);
                        plain::swiglu(g, x.remove(0))
                    },
                    &device,
                ),
            );
            let q = [
                Input::random([tokens, heads, dim], 1),
                Input::random([tokens, kv, dim], 2),
                Input::random([tokens, kv, dim], 3),
            ];
            let positions: Vec<u32> = (0..tokens as u32).collect();
            let tables = Rotary::new(dim, 1e4, RopeScaling::None).tables(&positions, &device);
            let id = time("", &q, |mut x| x.remove(0), &device);
            show(
                "rotary",
                id,
                time("", &q[..1], |mut x| tables.apply(x.remove(0)), &device),
                time("", &q[..1], |mut x| plain::rotary(x.remove(0), &tables), &device),
            );
            if label == "tiny" {
                let c = [
                    Input::random([1, heads, dim], 1),
                    Input::random([1000, kv, dim], 2),
                    Input::random([1000, kv, dim], 3),
                ];
                let spans = [Span { queries: 0..1, keys: 0..1000 }];
                show(
                    "decode",
                    id,
                    time(
                        "",
                        &c,
                        |mut x| {
                            let q = x.remove(0);
                            attention(q, &x[0], &x[1], &spans)
                        },
                        &device,
                    ),
                    time("", &c, |x| plain::attention(&x[0], &x[1], &x[2], &spans), &device),
                );
            }
            let per = tokens / n;
            let spans: Vec<Span> = (0..n)
                .map(|i| Span::document(i * per..if i + 1 == n { tokens } else { (i + 1) * per }))
                .collect();
            show(
                "attention",
                id,
                time(
                    "",
                    &q,
                    |mut x| {
                        let q = x.remove(0);
                        attention(q, &x[0], &x[1], &spans)
                    },
                    &device,
                ),
                time("", &q, |x| plain::attention(&x[0], &x[1], &x[2], &spans), &device),
            );
        }
    }
}
