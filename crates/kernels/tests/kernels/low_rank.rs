use pronk_kernels::add_low_rank;

use crate::reference::{Input, check, dot};

const SCALE: f64 = 1.5;

/// `a b^T`, with rows of `width`.
fn times_transposed(a: &[f64], b: &[f64], width: usize) -> Vec<f64> {
    a.chunks_exact(width).flat_map(|a| b.chunks_exact(width).map(move |b| dot(a, b))).collect()
}

#[test]
fn odd_sizes_and_more_than_one_task() {
    let sizes = [
        [1, 3, 5, 1],
        [7, 13, 11, 3],
        [67, 130, 9, 4],
        [65, 5, 131, 8],
        [530, 2, 3, 2],
        [5, 64, 36, 16],
        [3, 35, 70, 11],
        [5, 9, 40, 30],
    ];
    for [tokens, inputs, outputs, rank] in sizes {
        let inputs_of_all = [
            Input::random([tokens, outputs], 1),
            Input::random([tokens, inputs], 2),
            Input::random([rank, inputs], 3),
            Input::random([outputs, rank], 4),
        ];
        let reference = |values: &[Vec<f64>]| -> Vec<f64> {
            let [y, x, a, b] = values else { panic!("four inputs") };
            let update = times_transposed(&times_transposed(x, a, inputs), b, rank);
            y.iter().zip(update).map(|(y, update)| y + SCALE * update).collect()
        };
        check(
            &format!("{tokens} tokens, {inputs} to {outputs}, rank {rank}"),
            &inputs_of_all,
            |t| add_low_rank(t[0].clone(), t[1].clone(), &t[2], &t[3], SCALE),
            reference,
        );
    }
}
