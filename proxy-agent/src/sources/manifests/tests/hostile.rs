//! Files that would take too much time, memory or stack.

use super::*;

#[tokio::test]
async fn hostile_files_are_refused_quickly() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let before = format!("*a{}", i - 1);
        bomb += &format!("a{i}: &a{i} [{}]\n", vec![before; 10].join(", "));
    }
    let mut followed = Followed::of(&[
        ("bomb.yaml", &bomb),
        ("deep.yaml", &nested(240)),
        ("deeper.yaml", &nested(1_000_000)),
        ("deep.json", &nested(1_000_000)),
        ("good.yaml", &service("s", 80)),
    ])
    .await;
    followed.expect(&["s:80"]).await;
    followed
        .expect_problem("bomb.yaml", "alias replay limit exceeded: total_replayed_events=100001 > 100000")
        .await;
    followed.expect_problem("deep.yaml", "may be nested 200 levels deep").await;
    followed.expect_problem("deeper.yaml", "recursion limit").await;
    followed.expect_problem("deep.json", "recursion limit").await;
    let huge = fs::File::create(followed.path("huge.yaml")).unwrap();
    huge.set_len((64 << 20) + 1).unwrap();
    drop(huge);
    followed.expect_problem("huge.yaml", "is larger than 67108864 bytes").await;
    fs::create_dir(followed.path("dir.yaml")).unwrap();
    followed.expect_problem("dir.yaml", "not a regular file").await;
    followed.write("binary.yaml", "a: \u{1}");
    followed.expect_problem("binary.yaml", "document 1").await;
    fs::write(followed.path("latin.yaml"), b"a: \xff\xfe").unwrap();
    followed.expect_problem("latin.yaml", "UTF-8").await;
}

fn nested(levels: usize) -> String {
    "[".repeat(levels) + &"]".repeat(levels)
}

/// Real files: a pipe, the kernel's log, a device, and a file larger than any disk.
#[tokio::test]
async fn what_has_no_end_costs_itself() {
    let mut followed = Followed::of(&[("good.yaml", &service("s", 80))]).await;
    followed.expect(&["s:80"]).await;
    let made = std::process::Command::new("mkfifo").arg(followed.path("pipe.yaml")).status().unwrap();
    assert!(made.success());
    symlink("/dev/zero", followed.path("zero.yaml")).unwrap();
    symlink("/proc/kmsg", followed.path("log.yaml")).unwrap();
    let sparse = fs::File::create(followed.path("sparse.yaml")).unwrap();
    sparse.set_len(10 << 30).unwrap();
    drop(sparse);
    for name in ["pipe.yaml", "zero.yaml"] {
        followed.expect_problem(name, "is not a regular file").await;
    }
    followed.expect_problem("sparse.yaml", "is larger than 67108864 bytes").await;
    followed.write("good.yaml", &service("s", 81));
    followed.expect(&["s:81"]).await;
}
