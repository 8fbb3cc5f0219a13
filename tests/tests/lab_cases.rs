//! The behaviour cases with the agent itself, its BPF programs and real sockets in the lab.
//!
//! Every case gets a lab of its own. The objects of a step are one manifest file that replaces the one before, and the
//! checks begin when the agent has programmed it. Endpoints are real servers, and everybody else whose address a
//! client asks for serves there, too: see the module `world`.
//!
//! What is checked is what the socket edge does, hence the senders on the node itself: P, P6, many pods, H. Where it
//! differs from the table, [`Case::on_sockets`] says so. UDP is tried with connected and with unconnected sockets.
//!
//! - Endpoints: the one that answers tells its name and its own address; getpeername and the source of datagrams are
//!   what the client asked for.
//! - `keep` and `masq`: sockets are translated before anything has a source. The server sees a pod by the pod's
//!   own address, and a process of the host by an address of the host.
//! - REJECT: the call that names the destination fails with ECONNREFUSED. A server listens at the destination, so it is
//!   not the kernel that refuses.
//! - DROP: the same with EPERM. Silence is for what acts on packets.
//! - PASS: the real owner of the destination answers.
//!
//! Pauses and affinity timeouts are a fifth of the table's.

mod falsify;
mod live;

use anyhow::{Context as _, Result};
use falsify::falsified;
use proxy_tests::cases::{self, Case};

/// Cases without a test here, and why.
const LEFT_OUT: [(&str, &str); 2] =
    [("P080", "senders outside of the node only"), ("P150", "senders outside of the node only")];

/// Defines one test per name, and the list of the names.
macro_rules! cases {
    ($($name:ident)*) => {
        const NAMES: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() -> Result<()> {
                run(stringify!($name))
            }
        )*
    };
}

fn run(name: &str) -> Result<()> {
    let case = cases::all().into_iter().find(|case| case.test_name() == name);
    live::check(case.context("no case of the table has this name")?)
}

#[test]
fn every_case_has_its_test_or_is_left_out() {
    let left_out = |case: &Case| LEFT_OUT.iter().any(|(id, _)| *id == case.id);
    let table = cases::all().into_iter().filter(|case| !left_out(case));
    assert_eq!(NAMES, table.map(|case| case.test_name()).collect::<Vec<_>>());
}

#[test]
fn cases_without_a_check_that_can_run_are_left_out() {
    let runnable = |case: &Case| case.steps.iter().flat_map(|step| &step.checks).any(live::is_runnable);
    let idle: Vec<_> = cases::all().iter().filter(|case| !runnable(case)).map(|case| case.id).collect();
    let left_out = LEFT_OUT.iter().filter(|(_, why)| why.starts_with("senders"));
    assert_eq!(idle, left_out.map(|(id, _)| *id).collect::<Vec<_>>());
}

/// One check of each kind.
#[test]
fn a_wrong_expectation_is_noticed() -> Result<()> {
    let all: Vec<Case> = cases::all();
    for id in ["P001", "P043", "P141", "P143", "P169"] {
        let case = all.iter().find(|case| case.id == id).context(id)?;
        for (wrong, check) in falsified(case).into_iter().filter(|(_, check)| live::is_runnable(check)) {
            let check = format!("{check:?}");
            let message = live::check(wrong).err().map(|error| format!("{error:#}"));
            assert!(message.as_ref().is_some_and(|text| text.contains(&check)), "{id}, {check}: {message:?}");
        }
    }
    Ok(())
}

cases! {
    p001_a_headless_service
    p002_no_clusterip_yet_but_a_nodeport
    p003_externalname_with_a_stale_clusterip_and_nodeport
    p004_a_service_for_another_proxy
    p005_handed_to_another_proxy_and_back
    p006_ipv6_only
    p007_both_families_ipv6_first
    p008_an_old_service_without_ipfamilies
    p009_two_ports_two_targets
    p010_one_number_three_protocols
    p011_nodeport_becomes_externalname
    p012_externalname_becomes_clusterip
    p013_spec_loadbalancerip_is_a_wish_not_an_address
    p014_a_load_balancer_that_has_only_a_host_name
    p015_leading_zeros_are_decimal
    p016_a_port_comes_and_goes
    p017_the_service_is_deleted_its_slice_remains
    p020_an_externalip_that_no_node_has
    p021_externalips_that_are_none_are_skipped
    p022_externalips_are_switched_off
    p023_a_load_balancer_address_with_ipmode_vip
    p024_a_load_balancer_address_with_ipmode_proxy_belongs_to_the_balancer
    p025_two_load_balancer_addresses
    p026_a_nodeport_on_the_primary_address
    p027_no_nodeport_on_a_secondary_address
    p028_nodeports_on_the_addresses_in_two_cidrs
    p029_nodeports_on_all_addresses_loopback_never
    p030_cidrs_of_one_family_leave_the_other_open
    p031_a_cidr_of_loopback_addresses_selects_nothing
    p032_a_load_balancer_without_nodeports
    p033_another_node_s_nodeport_is_that_node_s_business
    p034_a_nodeport_over_ipv6
    p035_one_nodeport_number_over_tcp_and_udp
    p036_a_nodeport_is_not_served_on_an_externalip
    p040_conditions_that_are_not_set_count_as_ready
    p041_an_endpoint_that_is_not_ready
    p042_two_slices_are_one_set
    p043_an_endpoint_in_two_slices_has_no_double_weight
    p044_one_address_three_times_in_a_slice
    p045_a_slice_port_without_a_name
    p046_a_slice_port_without_a_number
    p047_an_unnamed_port
    p048_port_names_that_differ
    p049_protocols_that_differ
    p050_one_port_name_two_numbers
    p051_one_endpoint_on_two_numbers
    p052_only_the_first_address_of_an_endpoint
    p053_an_endpoint_without_an_address
    p054_a_slice_of_host_names
    p055_a_slice_that_belongs_to_no_service
    p056_a_slice_becomes_headless
    p057_the_slice_comes_before_the_service
    p058_an_endpoint_moves_to_another_slice
    p059_a_slice_is_updated_in_place
    p060_one_of_two_slices_is_deleted
    p061_slices_of_other_services_and_namespaces
    p062_an_endpoint_without_a_node_is_nowhere_near
    p063_ready_and_terminating_at_once_as_published
    p070_ready_before_terminating
    p071_terminating_and_serving_when_none_is_ready
    p072_terminating_and_not_serving
    p073_serving_but_neither_ready_nor_terminating
    p074_internal_policy_local
    p075_internal_policy_local_without_a_local_endpoint
    p076_a_local_terminating_endpoint_before_a_remote_ready_one
    p077_the_only_local_endpoint_does_not_serve_any_more
    p078_no_endpoint_serves_anywhere
    p079_the_internal_policy_does_not_touch_external_frontends
    p081_external_policy_local_pods
    p082_external_policy_local_the_host
    p083_the_external_policy_does_not_touch_the_clusterip
    p084_external_policy_local_without_a_local_endpoint
    p085_the_same_on_the_nodeport
    p086_the_local_set_falls_back_by_itself
    p087_a_local_ready_endpoint_before_a_local_terminating_one
    p088_the_only_endpoint_is_remote_and_terminates
    p089_no_endpoint_serves
    p090_both_policies_local_the_endpoint_is_remote
    p091_an_external_policy_that_means_nothing
    p092_external_policy_local_with_externalips_alone
    p093_external_policy_cluster_falls_back_everywhere
    p094_a_terminating_endpoint_gives_way_to_a_ready_one
    p095_external_policy_local_without_detect_local
    p100_endpoints_for_our_zone
    p101_one_endpoint_without_a_hint_switches_hints_off
    p102_no_endpoint_for_our_zone
    p103_a_node_without_a_zone
    p104_a_node_with_an_empty_zone
    p105_the_only_endpoint_for_our_zone_is_not_ready
    p106_endpoints_for_several_zones
    p107_the_hint_for_our_node_comes_first
    p108_no_endpoint_for_our_node_but_for_our_zone
    p109_one_endpoint_without_a_hint_switches_both_modes_off
    p110_hints_narrow_the_cluster_set_only
    p111_the_local_set_ignores_hints
    p112_a_preference_without_hints
    p113_hints_without_a_preference
    p114_the_node_moves_to_other_zones
    p140_no_endpoints_at_all
    p141_no_endpoints_udp
    p142_another_port_or_protocol_of_a_clusterip
    p143_an_address_for_services_that_no_service_has
    p144_the_same_where_no_servicecidr_is_known
    p145_a_clusterip_does_not_answer_ping
    p146_other_ports_of_external_addresses_are_not_ours
    p147_the_slice_is_deleted_and_made_again
    p148_a_port_that_no_slice_has
    p149_no_refusal_on_an_address_without_nodeports
    p151_the_ranges_are_about_the_load_balancer_address_alone
    p152_pods_and_the_host_need_to_be_in_range_too
    p153_the_host_is_in_range
    p154_white_space_around_a_range
    p155_everybody_is_in_range
    p156_some_pods_are_in_range
    p157_the_ranges_are_taken_away
    p158_ranges_hold_for_every_load_balancer_address
    p160_one_client_stays_with_one_endpoint
    p161_many_clients_are_spread_each_stays
    p162_a_client_is_forgotten_after_the_timeout
    p163_every_connection_begins_the_timeout_anew
    p164_the_remembered_endpoint_is_removed
    p165_affinity_off_and_on_again
    p166_affinity_through_a_nodeport
    p167_every_port_has_a_memory_of_its_own
    p168_affinity_of_datagrams
    p169_affinity_without_a_configuration
}
