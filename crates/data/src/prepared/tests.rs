use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::error::DataError;
use crate::order::Part;

fn dataset() -> PreparedDataset {
    let row = |ids: &[u32]| TokenizedExample {
        token_ids: ids.to_vec(),
        loss_mask: (0..ids.len()).map(|i| i > 0).collect(),
    };
    PreparedDataset {
        key: "k".repeat(64),
        train: [row(&[5, 6, 7]), row(&[8, 9]), row(&[1, 2, 3, 4])].iter().collect(),
        validation: [row(&[70_000, 2])].iter().collect(),
        mixture: Mixture::new(vec![Part { rows: 1, weight: 0.25 }, Part { rows: 2, weight: 3.0 }]),
        report: PrepareReport { records: 4, base: Some("ä".into()), ..PrepareReport::default() },
        template: "alpaca".to_owned(),
        max_seq_len: 4,
    }
}

fn written(dir: &TempDir) -> (PathBuf, Vec<u8>) {
    let path = dir.path().join("data.prep");
    dataset().write(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    (path, bytes)
}

/// What reading `bytes` complains of.
fn refusal(bytes: &[u8]) -> String {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.prep");
    fs::write(&path, bytes).unwrap();
    let error = PreparedDataset::read(&path).unwrap_err();
    assert!(matches!(error, DataError::Prepared { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("x.prep") && message.contains("pronk prep"), "{message}");
    message
}

#[test]
fn rows_come_back_as_they_were() {
    let data = dataset();
    assert_eq!((data.train.len(), data.train.tokens(), data.train.supervised()), (3, 9, 6));
    assert_eq!(data.train.get(1).unwrap().token_ids, [8, 9]);
    assert_eq!(data.train.get(2).unwrap().to_example().loss_mask, [false, true, true, true]);
    assert_eq!(data.train.get(3), None);
    assert_eq!(data.train.get(usize::MAX), None);
    assert_eq!(data.train.iter().map(|row| row.tokens()).collect::<Vec<_>>(), [3, 2, 4]);
    assert_eq!(data.validation.max_token_id(), Some(70_000));
    assert_eq!(Rows::default().max_token_id(), None);
    assert!(Rows::default().is_empty());
}

#[test]
fn a_file_holds_everything_and_is_the_same_each_time() {
    let dir = TempDir::new().unwrap();
    let (path, bytes) = written(&dir);
    assert_eq!(PreparedDataset::read(&path).unwrap(), dataset());
    assert_eq!(written(&dir).1, bytes);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    let none = PreparedDataset { validation: Rows::default(), ..dataset() };
    none.write(&path).unwrap();
    assert_eq!(PreparedDataset::read(&path).unwrap(), none);
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let (_, bytes) = written(&TempDir::new().unwrap());
    for length in 0..bytes.len() {
        refusal(&bytes[..length]);
    }
    refusal(&[bytes.as_slice(), b"more"].concat());
}

#[test]
fn a_file_with_any_byte_changed_is_an_error_or_the_same_data() {
    let dir = TempDir::new().unwrap();
    let (path, bytes) = written(&dir);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x41;
        fs::write(&path, &changed).unwrap();
        let read = PreparedDataset::read(&path); // must not panic
        let unnoticed = |read| at >= header || read != dataset();
        assert!(!read.is_ok_and(unnoticed), "a change at byte {at} went unnoticed");
    }
}

#[test]
fn a_header_that_was_changed_is_an_error() {
    let (_, bytes) = written(&TempDir::new().unwrap());
    for (before, after) in [
        (r#"\"weight\":3.0"#, r#"\"weight\":1.0"#),
        (r#"\"template\":\"alpaca\""#, r#"\"template\":\"elpaca\""#),
        (r#"\"max_seq_len\":4"#, r#"\"max_seq_len\":9"#),
        (r#"\"records\":4"#, r#"\"records\":5"#),
        (r#"\"key\":\"kk"#, r#"\"key\":\"jk"#),
    ] {
        let at = bytes.windows(before.len()).position(|window| window == before.as_bytes()).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + after.len()].copy_from_slice(after.as_bytes());
        assert!(refusal(&changed).contains("damaged: checksum"), "{after}");
    }
}

#[test]
fn foreign_files_are_told_apart() {
    assert!(refusal(b"").contains("shorter than 8 bytes"));
    assert!(refusal(&[0xff; 64]).contains("does not begin with the length of a header"));
    assert!(refusal(&(1_u64 << 60).to_le_bytes()).contains("does not begin with the length of a header"));
    assert!(refusal(b"[{\"instruction\": \"a\", \"output\": \"b\"}]").contains("not a prepared dataset"));
    let model = safetensors::serialize(
        [("w", safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![2], &[1, 2]).unwrap())],
        None,
    );
    assert!(refusal(&model.unwrap()).contains("not one that `pronk prep` wrote"));
    assert!(matches!(PreparedDataset::read("/no/such.prep".as_ref()), Err(DataError::Io { .. })));
}

/// Data that a checksum does not catch, because it was wrong when it was written.
#[test]
fn rows_that_are_no_rows_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("bad.prep");
    let refused = |change: fn(&mut PreparedDataset)| {
        let mut data = dataset();
        change(&mut data);
        data.write(&path).unwrap();
        PreparedDataset::read(&path).unwrap_err().to_string()
    };
    for (change, expected) in [
        (
            (|d| d.train.offsets[1] = 1 << 60) as fn(&mut PreparedDataset),
            "row 0 goes from 0 to 1152921504606846976",
        ),
        (|d| d.train.offsets.swap(1, 2), "row 0 goes from 0 to 5"),
        (|d| d.train.offsets[1] = 0, "row 0 goes from 0 to 0"),
        (|d| d.train.offsets.clear(), "offsets go from None to None"),
        (|d| d.train.offsets[3] = 8, "expected 0 to 9"),
        (|d| d.train.offsets[0] = 1, "expected 0 to 9"),
        (|d| d.train.loss_mask[3] = true, "row 1 has a label on its first token"),
        (|d| d.train.loss_mask.truncate(d.train.loss_mask.len() - 1), "8 label marks for 9 tokens"),
        (|d| d.validation.token_ids.truncate(d.validation.token_ids.len() - 1), "2 label marks for 1 tokens"),
        (|d| d.max_seq_len = 3, "row 2 goes from 5 to 9, expected 1 to 3"),
        (|d| d.mixture = Mixture::once(4), "3 rows to train on, but weights for 4"),
    ] {
        let error = refused(change);
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn another_format_says_which() {
    let (_, bytes) = written(&TempDir::new().unwrap());
    let mark = br#"{\"version\":3,"#;
    let at = bytes.windows(mark.len()).position(|window| window == mark).unwrap() + mark.len() - 2;
    for version in ["2", "7"] {
        let mut other = bytes.clone();
        other[at] = version.as_bytes()[0];
        let expected = format!("written in format {version}, this pronk reads format 3");
        assert!(refusal(&other).contains(&expected));
    }
}

#[test]
fn a_folder_that_is_not_there_is_an_error_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let error = dataset().write(&dir.path().join("no/such/data.prep")).unwrap_err().to_string();
    assert!(error.contains("cannot write the prepared file"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
