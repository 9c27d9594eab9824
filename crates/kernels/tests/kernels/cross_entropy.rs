use pronk_kernels::{FrozenLinear, LossGradients, cross_entropy};

use crate::reference::{Input, assert_close, devices, dot, host, slopes};

const HIDDEN: usize = 7;
const VOCAB: usize = 13;

/// `-log softmax(h W^T)[target]` of one row, its logits capped where they are to be.
fn row_loss(h: &[f64], head: &[f64], target: u32, cap: Option<f32>) -> f64 {
    let capped = |logit: f64| cap.map(f64::from).map_or(logit, |cap| cap * (logit / cap).tanh());
    let logits: Vec<f64> = head.chunks_exact(HIDDEN).map(|w| capped(dot(h, w))).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|l| (l - top).exp()).sum();
    top + total.ln() - logits[target as usize]
}

fn check(what: &str, rows: usize, scale: f32, cap: Option<f32>) {
    let hidden = Input::random([rows, HIDDEN], 1).scaled(scale);
    let head = Input::random([VOCAB, HIDDEN], 2);
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 5 % VOCAB as u32).collect();
    let rows = || hidden.values.chunks_exact(HIDDEN).zip(&targets);
    let sum: f64 = rows().map(|(h, &target)| row_loss(h, &head.values, target, cap)).sum();
    let gradient: Vec<f64> =
        rows().flat_map(|(h, &target)| slopes(|h| row_loss(h, &head.values, target, cap), h)).collect();
    // A row's loss depends on the head as on the hidden states: of the head's numbers here, by differences.
    let head_loss = |head: &[f64]| rows().map(|(h, &target)| row_loss(h, head, target, cap)).sum();
    let head_gradient = slopes(head_loss, &head.values);

    for (name, device) in devices() {
        let what = format!("{what} on {name}");
        let (h, head) = (hidden.on(&device), FrozenLinear::new(head.on(&device), None));
        let found = cross_entropy(&h, &head, &targets, cap, LossGradients::HiddenAndHead);
        assert_close(&what, &host(&found.sum), &[sum]);
        assert_close(&format!("{what}, gradient"), &host(&found.gradient.unwrap()), &gradient);
        let of_head = host(&found.head_gradient.unwrap());
        assert_close(&format!("{what}, gradient of the head"), &of_head, &head_gradient);

        let of_hidden = cross_entropy(&h, &head, &targets, cap, LossGradients::Hidden);
        assert!(of_hidden.gradient.is_some() && of_hidden.head_gradient.is_none());
        let without = cross_entropy(&h, &head, &targets, cap, LossGradients::None);
        assert_eq!(host(&without.sum), host(&found.sum));
        assert!(without.gradient.is_none() && without.head_gradient.is_none());
    }
}

#[test]
fn less_than_one_chunk_and_more() {
    for rows in [1, 1023, 1024, 1025, 2500] {
        check(&format!("cross entropy of {rows} rows"), rows, 1.0, None);
    }
}

#[test]
fn capped_logits() {
    for (rows, scale, cap) in [(1, 1.0, 0.7), (1025, 3.0, 2.0), (31, 20.0, 30.0)] {
        check(&format!("cross entropy of {rows} rows, capped at {cap}"), rows, scale, Some(cap));
    }
}

/// The exponential of such logits overflows float32.
#[test]
fn large_logits() {
    check("cross entropy of large logits", 31, 200.0, None);
}

#[test]
fn no_targets_at_all() {
    for (_, device) in devices() {
        let hidden = Input::<2> { values: Vec::new(), shape: [0, HIDDEN] }.on(&device);
        let head = FrozenLinear::new(Input::random([VOCAB, HIDDEN], 2).on(&device), None);
        let found = cross_entropy(&hidden, &head, &[], None, LossGradients::Hidden);
        assert_eq!(host(&found.sum), [0.0]);
        assert_eq!(found.gradient.unwrap().dims(), [0, HIDDEN]);
    }
}
