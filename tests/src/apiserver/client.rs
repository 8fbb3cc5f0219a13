//! Writing objects to an API server, the test one or a real one.

use anyhow::{Context as _, Result};
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use super::object::Key;
use super::resource::Resource;

/// Returns a kubeconfig for one server. With a token it is for a real server, whose certificate is then not verified.
pub fn kubeconfig(url: &str, token: Option<&str>) -> String {
    let (tls, user) = match token {
        Some(token) => ("\n    insecure-skip-tls-verify: true", format!("{{ token: \"{token}\" }}")),
        None => ("", "{}".to_owned()),
    };
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: test\n  cluster:\n    server: {url}{tls}\nusers:\n- name: \
         test\n  user: {user}\ncontexts:\n- name: test\n  context: {{ cluster: test, user: test }}\ncurrent-context: \
         test\n"
    )
}

/// Connects to the server that a kubeconfig names, regardless of this process's environment.
///
/// # Errors
/// If the kubeconfig is not valid.
pub async fn connect(kubeconfig: &str) -> Result<Client> {
    let kubeconfig = kube::config::Kubeconfig::from_yaml(kubeconfig)?;
    let options = kube::config::KubeConfigOptions::default();
    Ok(Client::try_from(kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?)?)
}

/// Creates or replaces an object, then its status if it has one. Creates a namespace that does not exist.
///
/// # Errors
/// If the object is of no known kind, or the server refuses it.
pub async fn apply(client: &Client, object: &Value) -> Result<()> {
    let (api, resource, key) = target(client, object)?;
    let what = || format!("cannot apply {} {}/{}", resource.kind(), key.namespace, key.name);
    let mut new: DynamicObject = serde_json::from_value(object.clone()).with_context(what)?;
    let params = PostParams::default();
    let written = match api.get_opt(&key.name).await.with_context(what)? {
        Some(old) => {
            new.metadata.resource_version = old.metadata.resource_version;
            api.replace(&key.name, &params, &new).await
        }
        None => match api.create(&params, &new).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => {
                let namespace = json!({
                    "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": key.namespace },
                });
                let (namespaces, ..) = target(client, &namespace)?;
                namespaces.create(&params, &serde_json::from_value(namespace)?).await.with_context(what)?;
                api.create(&params, &new).await
            }
            created => created,
        },
    };
    let written = written.with_context(what)?;
    if resource.has_status() && object.get("status").is_some() {
        new.metadata.resource_version = written.metadata.resource_version;
        api.replace_status(&key.name, &params, &new).await.with_context(what)?;
    }
    Ok(())
}

/// Deletes the object with the kind, namespace and name of `object`; returns whether it existed.
///
/// # Errors
/// If the object is of no known kind, or the server refuses.
pub async fn delete(client: &Client, object: &Value) -> Result<bool> {
    let (api, _, key) = target(client, object)?;
    match api.delete(&key.name, &DeleteParams::default()).await {
        Ok(_deleted) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn target(client: &Client, object: &Value) -> Result<(Api<DynamicObject>, Resource, Key)> {
    let resource = Resource::of(object)?;
    let key = Key::of(resource, object).map_err(|problem| anyhow::anyhow!(problem))?;
    let kind = GroupVersionKind::gvk(resource.group(), "v1", resource.kind());
    let description = ApiResource::from_gvk_with_plural(&kind, resource.plural());
    let api = if resource.namespaced() {
        Api::namespaced_with(client.clone(), &key.namespace, &description)
    } else {
        Api::all_with(client.clone(), &description)
    };
    Ok((api, resource, key))
}
