{{- /* Bytes of a quantity such as 64Gi. */}}
{{- define "shoal.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .)) | int64 -}}
{{- end -}}

{{- /* Bytes of a routed expert of every MoE layer, as hosts hold it. 0: unknown. GPUs keep the checkpoint's dtype, CPUs
       bfloat16 alone, else float32. Where the dtype is not said: 16 bits on GPUs, 32 on CPUs. */}}
{{- define "shoal.expertBytes" -}}
{{- $shape := .Values.model.shape -}}
{{- $gpu := gt (int .Values.experts.gpus) 0 -}}
{{- $dtype := $shape.dtype | default "" -}}
{{- $narrow := ternary (ne $dtype "float32") (eq $dtype "bfloat16") $gpu -}}
{{- $width := ternary 2 4 $narrow -}}
{{- mul 3 (int64 $shape.hiddenSize) (int64 $shape.moeIntermediateSize) $width (int64 $shape.moeLayers) -}}
{{- end -}}

{{- /* Copies of a layer's experts. */}}
{{- define "shoal.expertCopies" -}}
{{- mul (int64 .Values.model.shape.routedExperts) (int64 .Values.experts.copies) -}}
{{- end -}}

{{- /* Bytes that a host may fill with experts: its memory less 2 GiB, or its GPU's less a tenth. 0: unchecked. */}}
{{- define "shoal.roomBytes" -}}
{{- if eq (int .Values.experts.gpus) 0 -}}
{{- max 0 (sub (include "shoal.bytes" .Values.experts.memory | int64) 2147483648) -}}
{{- else if .Values.experts.gpuMemory -}}
{{- mulf 0.9 (include "shoal.bytes" .Values.experts.gpuMemory | float64) | int64 -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{- /* Hosts that the experts need at least, each layer dealt evenly to them. */}}
{{- define "shoal.fewestHosts" -}}
{{- $bytes := include "shoal.expertBytes" . | int64 -}}
{{- $room := include "shoal.roomBytes" . | int64 -}}
{{- $copies := include "shoal.expertCopies" . | int64 -}}
{{- $each := div $room (max 1 $bytes) -}}
{{- $enough := ternary (add 1 $copies) (div (add $copies $each -1) (max 1 $each)) (eq $each 0) -}}
{{- max 1 (ternary $enough 1 (and (gt $bytes 0) (gt $room 0))) (int64 .Values.experts.copies) -}}
{{- end -}}

{{- /* Hosts with which the service starts, and below which KubeRay never goes. */}}
{{- define "shoal.minReplicas" -}}
{{- .Values.experts.minReplicas | default (include "shoal.fewestHosts" .) | int64 -}}
{{- end -}}

{{- define "shoal.gibibytes" -}}
{{- printf "%.1f GiB" (divf (float64 .) 1073741824.0) -}}
{{- end -}}
