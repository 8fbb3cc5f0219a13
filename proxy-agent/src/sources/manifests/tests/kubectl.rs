//! Tests with files as people and tools write them and kubectl accepts them.

use super::*;

#[tokio::test]
async fn files_that_kubectl_takes() {
    let mut followed = Followed::of(&[]).await;
    for (name, content, port) in [
        ("closed.yaml", annotated("'[\n      1\n    ]\n    '", 85), 85),
        ("closed-at-once.yaml", annotated("\"{\n      1\n    }\"", 86), 86),
        ("tab.yaml", annotated("\"a\tb\"", 87), 87),
        ("tabs-alone.yaml", annotated("\"a\n\tb\"", 89), 89),
        ("tabs.yaml", annotated("\"a\n     \tb\"", 88), 88),
        ("bom.yaml", format!("\u{feff}{}", service("a", 80)).into_bytes(), 80),
        ("bom.json", format!("\u{feff}{}", json("a")).into_bytes(), 80),
        ("wide.json", utf16(&json("a")), 80),
        ("wide.yaml", utf16(&service("a", 80)), 80),
        ("yaml.json", service("a", 81).into_bytes(), 81),
        ("json.yaml", json("a").into_bytes(), 80),
        ("float.yaml", service("a", 80).replace("port: 80", "port: 82.0").into_bytes(), 82),
        ("comment.yaml", format!("# first\n---\n# nothing\n---\n{}", service("a", 83)).into_bytes(), 83),
        ("directive.yaml", format!("%YAML 1.2\n---\n{}...\n", service("a", 84)).into_bytes(), 84),
    ] {
        fs::write(followed.path(name), content).unwrap();
        followed.expect(&[&format!("a:{port}")]).await;
        followed.expect_no_problem().await;
        fs::remove_file(followed.path(name)).unwrap();
        followed.expect(&[]).await;
    }
    // The last of duplicate keys counts, and a problem says so.
    followed.write("a.yaml", &format!("{}---\n{}kind: Service\n", service("s", 80), service("t", 81)));
    followed.expect(&["s:80", "t:81"]).await;
    followed
        .expect_problem(
            "a.yaml, document 2 (line 9)",
            "\"kind\" is there twice at line 16, column 1: the last one",
        )
        .await;
    let deep = format!(
        "kind: Schema\napiVersion: v1\na: {}{}\n---\n{}",
        "[".repeat(150),
        "]".repeat(150),
        service("s", 82)
    );
    followed.write("a.yaml", &deep);
    followed.expect(&["s:82"]).await;
    followed.expect_no_problem().await;
    for (text, reason) in [
        ("kind: service\napiVersion: v1", "kind \"service\" is none; Service may be meant"),
        (
            "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1\nmetadata: {name: s}\naddressType: IPv4",
            "label kubernetes.io/service-name is missing, so it belongs to no Service",
        ),
    ] {
        followed.write("c.yaml", text);
        followed.expect_problem("c.yaml, document 1 (line 1)", reason).await;
    }
}

/// Returns a Service with an annotation over several lines, as Multus has them.
fn annotated(annotation: &str, port: u16) -> Vec<u8> {
    let block = format!("metadata:\n  name: a\n  namespace: a\n  annotations:\n    a: {annotation}");
    service("a", port).replace("metadata: {name: a, namespace: a}", &block).into_bytes()
}

fn json(name: &str) -> String {
    serde_json::json!({
        "kind": "Service", "apiVersion": "v1", "metadata": {"name": name},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]},
    })
    .to_string()
}

fn utf16(text: &str) -> Vec<u8> {
    std::iter::once(0xfeff).chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect()
}
